import json
import threading

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    Qwen2Config,
    StaticCache,
)

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from weightwatch import recording
from weightwatch.bounds import Bounds
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.recording import Peaks
from weightwatch.scanning import scan
from weightwatch.watching import watch

SMALL = {"vocab_size": 50, "max_position_embeddings": 256}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def model_of(kind):
    """A small random model and the names of its blocks."""
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_llama(vocab_size=50, hidden_size=32, layers=3), "model.layers"
    if kind == "gpt2":
        config = GPT2Config(vocab_size=50, n_positions=256, n_embd=32, n_layer=3, n_head=2, **NO_ENDS)
        return AutoModelForCausalLM.from_config(config).eval(), "transformer.h"
    if kind == "gpt_neox":
        return AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL, **SIZES, **NO_ENDS)).eval(), "gpt_neox.layers"
    if kind == "qwen2":
        config = Qwen2Config(**SMALL, **SIZES, **NO_ENDS, num_key_value_heads=1)
        return AutoModelForCausalLM.from_config(config).eval(), "model.layers"
    return AutoModelForMaskedLM.from_config(BertConfig(**SMALL, **SIZES, pad_token_id=0)).eval(), "bert.encoder.layer"


def bank_of(prefix, blocks=(0, 1), count=5, width=32):
    """Random directions; the last block has one fewer, so its rows are padded."""
    torch.manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(len(blocks), count, width), dim=-1)
    vectors[-1, -1] = 0
    labels = [tuple(f"D{layer}_u{i}" for i in range(count)) for layer in blocks]
    labels[-1] = labels[-1][:-1]
    sigma = tuple((1.0,) * len(row) for row in labels)
    return Bank(tuple(blocks), tuple(f"{prefix}.{layer}" for layer in blocks), vectors, tuple(labels), sigma, "digest")


def cosines(model, bank, ids):
    """The cosine of each token and direction from the hidden states of one forward over one input."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    parts = zip(bank.layers, bank.vectors, bank.counts, strict=True)
    unit = [torch.nn.functional.normalize(states[layer + 1][0], dim=-1) @ vectors[:count].mT for layer, vectors, count in parts]
    return torch.cat(unit, dim=1).numpy()


def check(model, bank, peaks, transcripts, skip=1):
    """Compare with a forward over each transcript, of which `prompt` tokens were given and the rest written."""
    assert len(peaks.low) == len(transcripts)
    for row, (ids, prompt) in enumerate(transcripts):
        cosine = cosines(model, bank, ids)
        for role, part in enumerate([range(skip, prompt), range(max(prompt, skip), len(ids))]):
            low, high, low_at, high_at = (one[row, role] for one in peaks)
            if len(part) == 0:
                assert (low == np.inf).all()
                assert (high == -np.inf).all()
                assert (low_at == -1).all()
                continue
            np.testing.assert_allclose(low, cosine[part].min(0), atol=2e-6)
            np.testing.assert_allclose(high, cosine[part].max(0), atol=2e-6)
            for value, at in ((low, low_at), (high, high_at)):  # where tokens repeat, either place will do
                assert set(at) <= set(part)
                np.testing.assert_allclose(cosine[at, np.arange(len(at))], value, atol=2e-6)


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    return ids, mask


PROMPTS = [[5, 9, 3, 7, 30, 2, 8], [11, 4], [1], [17, 23, 6, 42]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}), ("gpt2", {}), ("gpt_neox", {}), ("qwen2", {}),
        ("llama", {"do_sample": True}), ("llama", {"use_cache": False}), ("llama", {"prefill_chunk_size": 3}),
        ("llama", {"cache_implementation": "static"}),
    ],
    ids=str,
)  # fmt: skip
def test_extremes_of_generate_are_those_of_one_forward_over_the_transcript(kind, options, monkeypatch):
    """Batches of different lengths, padded on the left; more tokens than are measured at once; two calls in one block."""
    monkeypatch.setattr(recording, "COLUMNS", 6)
    model, prefix = model_of(kind)
    bank, transcripts = bank_of(prefix), []
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with watch(model, bank) as watching:
        for prompts in (PROMPTS, [[7, 7, 8]]):
            ids, mask = left_padded(prompts)
            written = model.generate(
                ids, attention_mask=mask, max_new_tokens=15, pad_token_id=0, **{"do_sample": False, **options}
            )
            transcripts += [
                (prompt + row[ids.shape[1] : -1].tolist(), len(prompt)) for prompt, row in zip(prompts, written, strict=True)
            ]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert "generate" not in vars(model)
    assert watching.inputs == 5
    check(model, bank, watching.peaks(), transcripts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_on_either_side_of_a_call_never_counts(kind, side):
    model, prefix = model_of(kind)
    bank = bank_of(prefix)
    ids, mask = left_padded(PROMPTS)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
        for row, prompt in enumerate(PROMPTS):
            ids[row, : len(prompt)] = torch.tensor(prompt)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # else a call knows nothing of padding on the left
    with watch(model, bank, skip_first=0) as watching, torch.inference_mode():
        model(ids, attention_mask=mask, position_ids=positions)
    check(model, bank, watching.peaks(), [(prompt, len(prompt)) for prompt in PROMPTS], skip=0)


def test_rows_end_at_their_end_token_even_where_others_go_on():
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    ids, mask = left_padded(PROMPTS)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]
    end = int(written[1, 3])
    with watch(model, bank) as watching:
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=end
        )[:, ids.shape[1] :]
    expected = []
    for row, prompt in enumerate(PROMPTS):
        tokens = written[row].tolist()
        kept = tokens[: tokens.index(end)] if end in tokens else tokens[:-1]
        expected.append((prompt + kept, len(prompt)))
    assert end in written[1].tolist()[:4]
    check(model, bank, watching.peaks(), expected)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_loop_of_the_callers_is_followed_by_its_cache(cache_class):
    """Two conversations in turns, a prompt in chunks, a batch with a mask that leaves out what one row no longer needs."""
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    caches = [
        cache_class(config=model.config, **({"max_cache_len": 40} if cache_class is StaticCache else {})) for _ in range(2)
    ]
    with watch(model, bank) as watching, torch.no_grad():
        for part in ([5, 9, 3], [7, 30], [2], [8], [4]):
            for shift, cache in enumerate(caches):
                model(torch.tensor([part]) + shift, past_key_values=cache)
    transcripts = [[5, 9, 3, 7, 30, 2, 8, 4], [6, 10, 4, 8, 31, 3, 9, 5]]
    check(model, bank, watching.peaks(), [(one, 5) for one in transcripts])


def test_a_cache_that_the_model_makes_itself_is_known_in_the_next_call():
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    with watch(model, bank) as watching, torch.no_grad():
        cache = model(torch.tensor([[5, 9, 3]]), use_cache=True).past_key_values
        model(torch.tensor([[7]]), past_key_values=cache)
    check(model, bank, watching.peaks(), [([5, 9, 3, 7], 3)])


def test_the_model_may_run_in_inference_mode_and_the_answer_be_asked_outside(monkeypatch):
    monkeypatch.setattr(recording, "COLUMNS", 4)
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    cache = DynamicCache(config=model.config)
    with watch(model, bank) as watching:
        with torch.inference_mode():
            model(torch.tensor([[5, 9, 3, 7, 30]]), past_key_values=cache)
        with torch.no_grad():
            model(torch.tensor([[2]]), past_key_values=cache)
        check(model, bank, watching.peaks(), [([5, 9, 3, 7, 30, 2], 5)])


def test_roles_that_the_caller_gives_hold_for_the_prompt_and_its_copies():
    """A conversation with a reply in it, whose end token ends nothing, sampled twice; the rest the model writes."""
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    prompt, roles = [5, 9, 3, 2, 7, 30], [0, 0, 1, 1, 0, 0]
    with watch(model, bank, skip_first=0) as watching:
        watching.roles = torch.tensor([roles])
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=True, num_return_sequences=2, eos_token_id=2, pad_token_id=2
        )
    for row, transcript in enumerate(written.tolist()):
        ids = transcript[:-1]
        said = ids[6:].index(2) if 2 in ids[6:] else len(ids) - 6
        cosine = cosines(model, bank, ids)
        for role in (0, 1):
            mine = [i for i, one in enumerate(roles + [1] * said) if one == role]
            np.testing.assert_allclose(watching.peaks().low[row, role], cosine[mine].min(0), atol=2e-6)
            np.testing.assert_allclose(watching.peaks().high[row, role], cosine[mine].max(0), atol=2e-6)


def test_events_say_where_an_input_left_its_range_and_are_json():
    model, prefix = model_of("llama")
    bank, bounds = bank_of(prefix), Bounds(np.full((2, 9), -1, np.float32), np.full((2, 9), 1, np.float32), "digest")
    tokenizer = character_tokenizer("".join(map(chr, range(97, 123))))
    with watch(model, bank) as watching:
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=4, do_sample=False)
    bounds.high[1, 3] = watching.extremes()[1][0, 1, 3] - 0.125
    bounds.low[0, 8] = np.inf
    with watch(model, bank, bounds, tokenizer=tokenizer) as watching:
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=4, do_sample=False)
        assert watching.flags().tolist() == [True]
        first, second = json.loads(json.dumps([event.to_json() for event in watching.events()]))
    assert (first["label"], first["role"], first["side"], first["bound"], first["margin"]) == (
        "D1_u3",
        "user",
        "low",
        None,
        None,
    )
    assert (second["label"], second["role"], second["side"], second["input"]) == ("D0_u3", "assistant", "high", 0)
    assert second["margin"] == pytest.approx(0.125)
    ids = watching.token_ids(0)
    assert [*ids] == [0, 1, 2, 3, 4, 5]
    assert second["token"] == ids[second["position"]]
    assert second["text"] == tokenizer.decode([second["token"]])
    watching.clear()
    assert watching.inputs == 0
    assert watching.events() == []


def test_a_cosine_that_is_not_a_number_is_an_error():
    model, prefix = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    bounds = Bounds(np.full((2, 9), -1, np.float32), np.full((2, 9), 1, np.float32), "digest")
    with watch(model, bank_of(prefix), bounds) as watching, torch.no_grad():
        model(torch.tensor([[5, 9, 3]]))
    with pytest.raises(UserError, match="NaN"):
        watching.flags()


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "paged"}], ids=str
)
def test_ways_to_generate_that_move_rows_are_refused(options):
    model, prefix = model_of("llama")
    with pytest.raises(UserError, match="rows do not keep their places"), watch(model, bank_of(prefix)):
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=4, pad_token_id=0, **options)
    assert "generate" not in vars(model)


def test_a_cache_that_was_cropped_or_whose_rows_changed_is_refused():
    model, prefix = model_of("llama")
    for change in (lambda cache: cache.crop(-1), lambda cache: cache.batch_repeat_interleave(2)):
        cache = DynamicCache(config=model.config)
        with watch(model, bank_of(prefix)), torch.no_grad():
            model(torch.tensor([[5, 9, 3]]), past_key_values=cache)
            change(cache)
            with pytest.raises(UserError, match=r"cropped|rows must stay"):
                model(torch.tensor([[7]]).expand(cache.layers[0].keys.shape[0], 1), past_key_values=cache)


def test_bounds_and_models_that_do_not_fit_are_refused():
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    for count, digest in ((3, "digest"), (9, "other")):
        low, high = np.zeros((2, 2, count), np.float32)
        with pytest.raises(UserError, match="do not belong together"), watch(model, bank, Bounds(low, high, digest)):
            pass
    with pytest.raises(UserError, match="has no module gpt_neox"), watch(model, bank_of("gpt_neox.layers")):
        pass
    with pytest.raises(UserError, match="has hidden size 32, the directions 48"), watch(model, bank_of(prefix, width=48)):
        pass
    with watch(model, bank) as watching, torch.no_grad():
        model(torch.tensor([[5, 9, 3]]))
    with pytest.raises(UserError, match="watch with bounds"):
        watching.flags()


def test_watches_may_end_in_any_order():
    model, prefix = model_of("llama")
    contexts = [watch(model, bank_of(prefix)) for _ in range(3)]
    watches = [one.__enter__() for one in contexts]
    seen = []
    for last in (1, 0, 2):
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=3, pad_token_id=0)
        contexts[last].__exit__(None, None, None)
        seen.append([one.inputs for one in watches])
    assert seen == [[1, 1, 1], [2, 1, 2], [2, 1, 3]]
    assert "generate" not in vars(model)


def test_threads_may_take_turns_and_are_refused_at_once():
    model, prefix = model_of("llama")
    bank, prompt, refused = bank_of(prefix), torch.tensor([[5, 9, 3]]), []

    def in_a_thread(read):
        def attempt():
            try:
                read()
            except UserError as error:
                refused.append(str(error))

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    def meanwhile(ids, scores, **_):
        in_a_thread(lambda: model(prompt))
        in_a_thread(lambda: model.generate(prompt, max_new_tokens=2, pad_token_id=0))
        return torch.zeros(1, dtype=torch.bool)

    with watch(model, bank) as watching, torch.no_grad():
        written = model.generate(prompt, max_new_tokens=3, pad_token_id=0, stopping_criteria=[meanwhile])
        assert len(refused) == 6
        assert all("take turns" in one for one in refused)
        in_a_thread(lambda: model.generate(prompt, max_new_tokens=3, pad_token_id=0))
        with pytest.raises(IndexError):
            model(torch.tensor([[50]]))
        in_a_thread(lambda: model(written))
    assert len(refused) == 6
    ids, failed = written[0].tolist(), 2
    peaks = Peaks(*(np.delete(part, failed, axis=0) for part in watching.peaks()))
    check(model, bank, peaks, [(ids[:-1], 3), (ids[:-1], 3), (ids, 6)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_is_compiled_within_the_block_is_watched(backend):
    torch.compiler.reset()
    model, prefix = model_of("llama")
    bank = bank_of(prefix)
    with watch(model, bank) as watching, torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        compiled(torch.tensor([[5, 9, 3, 7]]))
    check(model, bank, watching.peaks(), [([5, 9, 3, 7], 4)])


def test_a_model_that_was_compiled_before_does_not_go_unwatched_in_silence():
    torch.compiler.reset()
    model, prefix = model_of("llama")
    compiled, ids = torch.compile(model, backend="eager"), torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        compiled(ids)
        with pytest.warns(UserWarning, match="read nothing while it was watched"), watch(model, bank_of(prefix)):
            compiled(ids)
        torch.compiler.reset()
        with watch(model, bank_of(prefix)) as watching:
            compiled(ids)
    assert watching.inputs == 1


def test_a_sharded_model_is_watched_and_scanned():
    model, prefix = model_of("llama")
    bank, prompt = bank_of(prefix), [5, 9, 3, 7]
    expected = cosines(model, bank, prompt)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with watch(model, bank) as watching, torch.no_grad():
            model(torch.tensor([prompt]))
        chat = TokenizedConversation("chat", np.int32(prompt), np.int8([0] * 4))
        [(_, scanned)] = scan(model, bank, [chat])
        with torch.no_grad():
            model(torch.tensor([prompt]))
    finally:
        torch.distributed.destroy_process_group()
    for peaks in (watching.peaks(), scanned):
        np.testing.assert_allclose(peaks.low[0, 0], expected[1:].min(0), atol=2e-6)
