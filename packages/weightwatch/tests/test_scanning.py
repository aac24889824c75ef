import numpy as np
import pytest
import torch

from lmcore.models import tiny_llama
from weightwatch import scanning
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.scanning import scan
from weightwatch.watching import watch


def conversations(count, seed=0):
    generator = np.random.default_rng(seed)
    for i, length in enumerate(generator.integers(1, 30, count)):
        yield TokenizedConversation(
            f"chat {i}", generator.integers(1, 50, length).astype(np.int32), generator.integers(0, 2, length).astype(np.int8)
        )


@pytest.fixture
def model():
    return tiny_llama(vocab_size=50, hidden_size=32, layers=4)


@pytest.fixture
def bank():
    vectors = torch.nn.functional.normalize(torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    labels = tuple(tuple(f"D{layer}_u{i}" for i in range(3)) for layer in (0, 1))
    return Bank((0, 1), ("model.layers.0", "model.layers.1"), vectors, labels, ((1.0,) * 3,) * 2, "digest")


def one_by_one(model, bank, chats):
    with watch(model, bank) as watching, torch.no_grad():
        for chat in chats:
            watching.roles = torch.tensor(chat.roles)[None]
            model(torch.tensor(chat.input_ids)[None])
    return watching.peaks()


def test_a_scan_gives_in_order_what_one_conversation_at_a_time_gives(model, bank, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 8)
    chats = [*conversations(20)]
    expected = one_by_one(model, bank, chats)
    ran = []
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in model.named_modules()]
    places, found = zip(*scan(model, bank, chats, batch_tokens=64), strict=True)
    for hook in hooks:
        hook.remove()
    assert [*places] == [range(8), range(8, 16), range(16, 20)]
    low, high, low_at, high_at = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.testing.assert_allclose(low, expected.low, atol=2e-6)
    np.testing.assert_allclose(high, expected.high, atol=2e-6)
    assert (low_at == expected.low_at).all()
    assert (high_at == expected.high_at).all()
    assert "model.layers.1" in ran
    assert not {"lm_head", "model.layers.2", "model.layers.3"} & {*ran}
    assert len(model.model.layers) == 4


def test_a_scan_that_starts_later_gives_the_same_bits(model, bank, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 8)
    chats = [*conversations(20)]
    whole = dict(scan(model, bank, chats, batch_tokens=64))
    for place, peaks in scan(model, bank, chats, batch_tokens=64, start=8):
        assert all(np.array_equal(one, other) for one, other in zip(peaks, whole[place], strict=True))


def test_the_model_is_whole_while_a_scan_waits_and_after_it_broke(model, bank, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 8)
    chats = [*conversations(20)]
    logits = model(torch.tensor([[1, 2, 3]])).logits
    running = scan(model, bank, chats)
    next(running)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, logits)
    with pytest.raises(IndexError):
        [*scan(model, bank, [TokenizedConversation("out of the vocabulary", np.int32([99]), np.int8([0]))])]
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, logits)
    assert "generate" not in vars(model)


def test_batches_hold_at_most_so_many_tokens_with_padding():
    lengths = [3, 9, 1, 9, 20, 2]
    assert scanning._batches(lengths, 18) == [[4], [1, 3], [0, 5, 2]]
