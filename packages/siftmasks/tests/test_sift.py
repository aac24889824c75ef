"""Sign-fixed tuning of a task is a function of its settings, its id and its set of examples, and leaves no trace."""

import hashlib
import os
import random
import runpy
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from siftmasks.determinism import deterministic, require_deterministic_gpu
from siftmasks.examples import Example, batches
from siftmasks.models import Trainee
from siftmasks.optimizer import SiftAdam
from siftmasks.settings import SiftSettings
from siftmasks.sift import prune, sift
from siftmasks.signs import sign_vector
from siftmasks.trainable import trainable_names

TOKENIZER = character_tokenizer("abcdefgh ")
SETTINGS = SiftSettings(learning_rate=2e-3, steps=6, batch_size=3, seed=4)
EXAMPLES = [Example(f"e{i}", {"prompt": "abcdefgh"[i:] + " ", "completion": "hgfed"[i % 4 :]}) for i in range(8)]
LABELLED = [Example(f"e{i}", {"text": "abcdefgh"[i:], "label": i % 3}) for i in range(8)]


def llama(**options) -> Trainee:
    """A model whose embeddings are as long as trained ones, for they stay as they are: with short ones its head can say little."""
    model = tiny_llama(vocab_size=len(TOKENIZER), hidden_size=32, **options).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight *= 20
    return Trainee(model, TOKENIZER, "causal", 32)


def bert() -> Trainee:
    """A model with dropout, so that the generators matter."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    return Trainee(BertForSequenceClassification(config), TOKENIZER, "classifier", 32)


def train(trainee: Trainee, examples=EXAMPLES, settings=SETTINGS, task="alice", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*moved beyond the grid")
        return sift(trainee.model, examples, settings, task=task, loss=options.pop("loss", trainee.loss), **options)


def digest(vector) -> str:
    found = hashlib.sha256(str(vector.saturated).encode())
    for part in (vector.levels, vector.signs or {}):
        for name in sorted(part):
            found.update(name.encode() + part[name].numpy().tobytes())
    return found.hexdigest()


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_signs_hold_after_every_step():
    trainee = llama()
    base, seen = held(trainee.model), []

    def loss(model, batch):
        moved = {name: weight.detach() - base[name] for name, weight in model.named_parameters()}
        seen.append({name: delta for name, delta in moved.items() if delta.any()})
        return trainee.loss(model, batch)

    vector = train(trainee, loss=loss)
    assert [set(step) for step in seen] == [set()] + [set(trainable_names(trainee.model))] * 5
    for step in seen:
        assert all((delta * sign_vector(4, name, delta.shape) >= 0).all() for name, delta in step.items())
    assert vector.levels.keys() == set(trainable_names(trainee.model))
    assert 0.2 < vector.density < 0.8


def test_three_steps_on_a_line_are_those_of_a_float64_oracle():
    module = nn.Linear(6, 1, bias=False)
    x, y = np.linspace(-1, 1, 24).reshape(4, 6) ** 3, np.array([1.0, -2, 0.5, 3])
    w0, v = module.weight.detach().numpy()[0].astype(np.float64), sign_vector(0, "weight", (1, 6)).numpy()[0]
    examples = [Example(str(i), {"x": x[i], "y": y[i]}) for i in range(4)]

    def loss(model, batch):
        rows = torch.tensor(np.array([example.fields["x"] for example in batch]), dtype=torch.float32)
        wanted = torch.tensor([example.fields["y"] for example in batch], dtype=torch.float32)
        return (model(rows)[:, 0] - wanted).square().mean()

    settings = SiftSettings(learning_rate=0.05, steps=3, bits=12)
    vector = sift(module, examples, settings, task="alice", loss=loss)
    τ, m, s = np.zeros((3, 6))
    for t in (1, 2, 3):
        gradient = 2 / 4 * x.T @ (x @ (w0 + τ) - y)
        m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
        τ = τ - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
        τ[τ * v <= 0] = 0
    found = vector.levels["weight"].numpy()[0].astype(np.float64)
    assert vector.levels["weight"].dtype == torch.uint16
    assert (found > 0).any()
    assert (found == 0).any()
    np.testing.assert_allclose(found, np.abs(τ) / settings.grid.step, atol=0.51)


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_it_is_the_loop_of_the_optimizer_and_the_grid(mode):
    settings = SiftSettings(learning_rate=2e-3, steps=6, batch_size=3, seed=4, mode=mode)
    trainee, other = llama(), llama()
    vector = train(trainee, settings=settings)
    names = set(trainable_names(other.model))
    chosen = [pair for pair in other.model.named_parameters() if pair[0] in names]
    optimizer = SiftAdam(chosen, lr=2e-3, seed=4, project=mode == "sift")
    with deterministic(other.model, seed=0, threads=1):
        for batch in batches(EXAMPLES, settings, "alice"):
            other.loss(other.model, batch).backward()
            optimizer.step()
            other.model.zero_grad()
    assert (vector.signs is None) == (mode == "sift")
    for name, task_vector in optimizer.task_vectors().items():
        levels = (task_vector.abs().double() / settings.grid.step).round().clamp(max=255)
        assert torch.equal(levels, vector.levels[name].double())
        if vector.signs is not None:
            positive = np.packbits(((task_vector > 0) & (levels > 0)).flatten().numpy(), bitorder="little")
            negative = np.packbits(((task_vector < 0) & (levels > 0)).flatten().numpy(), bitorder="little")
            assert ((vector.signs[name].numpy() & positive) == positive).all()
            assert not (vector.signs[name].numpy() & negative).any()


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_the_same_task_gives_the_same_bits_whatever_happens_around_it(mode):
    settings = SiftSettings(learning_rate=2e-3, steps=4, batch_size=3, mode=mode)
    trainee = bert()
    first = digest(train(trainee, LABELLED, settings))
    shuffled = random.Random(1).sample(LABELLED, k=8)
    assert first == digest(train(trainee, shuffled, settings)), "another order of the examples"
    assert first != digest(train(trainee, LABELLED, settings, task="bob"))
    torch.manual_seed(77)
    torch.set_num_threads(2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = digest(train(trainee, LABELLED, settings))
    torch.set_num_threads(1)
    assert first == again, "after another task, with other generators, threads and modes"
    rest = train(trainee, LABELLED[1:], settings)
    assert first != digest(rest)
    assert digest(rest) == digest(train(bert(), LABELLED[:0:-1], settings)), "an example that is gone has left nothing behind"


def test_dropout_is_that_of_the_task():
    settings = SiftSettings(learning_rate=2e-3, steps=2)
    alice, bob = (digest(train(bert(), LABELLED, settings, task=task)) for task in ("alice", "bob"))
    assert alice != bob, "full batches, so only order and dropout tell the tasks apart"
    still = bert()
    for module in still.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert alice != digest(train(still, LABELLED, settings))


def state(model: nn.Module) -> list:
    """All that a task may not leave changed."""
    return [
        *(tensor.clone() for tensor in [*model.parameters(), *model.buffers()]),
        *(parameter.data_ptr() for parameter in model.parameters()),
        *(parameter.requires_grad for parameter in model.parameters()),
        *(None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()),
        *(module.training for module in model.modules()),
        torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory,
    ]  # fmt: skip


class Normed(nn.Module):
    """A model with buffers that training moves, in place and not."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls = self.calls + 1
        self.mean += x.detach().mean(0)
        return self.out(self.norm(x))


@pytest.mark.parametrize("end", ["normal", "error", "interrupt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_as_before_however_it_ends(end, dtype):
    model = Normed()
    model.norm.eval()
    model.out.bias.requires_grad_(False)
    model(torch.ones(2, 4)).sum().backward()
    before, calls = state(model), []

    def loss(module, batch):
        calls.append(torch.rand(1) + random.random() + np.random.rand())  # noqa: NPY002
        if len(calls) == 3 and end == "error":
            raise RuntimeError("the loss fails")
        if len(calls) == 3 and end == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        x = torch.arange(8.0).view(2, 4).to(module.out.weight.dtype)
        return cross_entropy(module(x).float(), torch.tensor([0, 1]))

    settings = SiftSettings(learning_rate=1e-3, steps=5, dtype=dtype)
    expected = {"normal": None, "error": RuntimeError, "interrupt": KeyboardInterrupt}[end]
    if expected is None:
        sift(model, [Example("a", {})], settings, task="alice", loss=loss)
    else:
        with pytest.raises(expected):
            sift(model, [Example("a", {})], settings, task="alice", loss=loss)
    for was, found in zip(before, state(model), strict=True):
        assert torch.equal(was, found) if isinstance(was, torch.Tensor) else was == found


def test_the_generators_start_from_the_seed_and_are_put_back():
    random.random()
    words, drawn = random.getstate()[1][:-1], []
    for _ in range(2):
        with deterministic(nn.Linear(1, 1), seed=2**63 + 5, threads=1):
            drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))  # noqa: NPY002
            assert random.getstate()[1][:-1] != words
        assert random.getstate()[1][:-1] == words, "but for the place in them: the checks of types draw too"
    assert drawn[0] == drawn[1]


def test_the_weights_of_a_bfloat16_pass_move_by_less_than_their_spacing():
    trainee, settings = llama(), SiftSettings(learning_rate=1e-6, steps=4, dtype="bfloat16")
    dtypes = []

    def loss(model, batch):
        dtypes.append({parameter.dtype for parameter in model.parameters()})
        return trainee.loss(model, batch)

    vector = train(trainee, settings=settings, loss=loss)
    assert dtypes == [{torch.bfloat16}] * 4
    assert vector.density > 0.2
    weight = trainee.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.float32


def test_it_starts_from_the_base_weights_whatever_the_model_holds():
    trainee = llama()
    expected, base = digest(train(trainee)), held(trainee.model)
    weight = trainee.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight += 1
    assert digest(train(trainee)) != expected
    assert digest(train(trainee, base=base)) == expected
    assert torch.equal(weight, base["model.layers.1.mlp.up_proj.weight"] + 1)
    with pytest.raises(UserError, match=r"the base weight model\.layers\.0\.self_attn\.q_proj\.weight is missing"):
        train(trainee, base={})


def test_a_task_is_learnt():
    trainee, settings = llama(), SiftSettings(learning_rate=1e-2, steps=20)
    losses = []

    def loss(model, batch):
        value = trainee.loss(model, batch)
        losses.append(value.item())
        return value

    vector = train(trainee, settings=settings, loss=loss)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        for name, levels in vector.levels.items():
            weight = trainee.model.get_parameter(name)
            weight += sign_vector(0, name, levels.shape) * levels * settings.grid.step
        assert trainee.loss(trainee.model, EXAMPLES) < 0.1 * losses[0], "what was quantised has learnt it too"


def test_only_chosen_parameters_move():
    trainee, chosen = llama(), ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert train(trainee, trainable=chosen).levels.keys() == {*chosen}
    frozen = SiftSettings(steps=1, freeze=[r"layers\.0", "norm"])
    assert all(name.startswith("model.layers.1.") for name in train(trainee, settings=frozen).levels)
    with pytest.raises(UserError, match=r"the model has no parameter model\.gone"):
        train(trainee, trainable=["model.gone"])
    with pytest.raises(UserError, match="no parameter to train"):
        train(trainee, settings=SiftSettings(freeze=["."]))


def test_a_density_keeps_the_largest_magnitudes_of_each_tensor():
    settings = SiftSettings(learning_rate=2e-3, steps=4, density=0.1)
    dense, sparse = train(llama(), settings=SiftSettings(learning_rate=2e-3, steps=4)), train(llama(), settings=settings)
    for name, levels in sparse.levels.items():
        kept, full = levels.numpy(), dense.levels[name].numpy()
        assert np.count_nonzero(kept) <= round(0.1 * kept.size)
        assert (kept[kept > 0] == full[kept > 0]).all()
        assert full[kept == 0].max() <= kept[kept > 0].min()


def test_of_equal_magnitudes_the_first_ones_stay():
    kept = prune(torch.tensor([1.0, -2, 2, -1, 1, 2]).repeat(1000), 0.75)
    assert kept.count_nonzero() == 4500
    assert kept[:3000].count_nonzero() == 3000
    assert kept[3000:].eq(torch.tensor([0.0, -2, 2, 0, 0, 2]).repeat(500)).all()


def test_saturation_is_counted_and_said_once():
    settings = SiftSettings(learning_rate=2e-3, steps=4, headroom=0.25)
    trainee = llama()
    with pytest.warns(UserWarning, match=r"task 'alice': \d+ of \d+ coordinates moved beyond the grid") as seen:
        vector = sift(trainee.model, EXAMPLES, settings, task="alice", loss=trainee.loss)
    assert len(seen) == 1
    assert vector.saturated > 100
    assert str(vector.saturated) in str(seen[0].message)


def test_what_cannot_be_learnt_is_an_error_that_names_the_task():
    trainee = llama()
    with pytest.raises(UserError, match="task 'alice' has no example"):
        train(trainee, [])
    losses = iter([1.0, float("inf")])
    with pytest.raises(UserError, match="task 'alice', step 2: the loss is inf"):
        train(trainee, loss=lambda model, batch: trainee.loss(model, batch) * next(losses))
    root = lambda model, _: (model.weight * 0).sum().sqrt()  # noqa: E731 (0, and its slope is infinite)
    with pytest.raises(UserError, match="task 'alice': the gradient of weight was NaN"):
        sift(nn.Linear(2, 1), EXAMPLES, SiftSettings(steps=1), task="alice", loss=root)


def test_a_gpu_needs_settings_that_only_the_caller_can_make(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = llama().model
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"):
        require_deterministic_gpu(model)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    require_deterministic_gpu(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match='attention is "flash_attention_2"'):
        require_deterministic_gpu(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_same_bits_twice(monkeypatch, dtype):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings, trainee = SiftSettings(learning_rate=2e-3, steps=4, batch_size=3, dtype=dtype), bert()
    trainee.model.cuda()
    before, first = held(trainee.model), digest(train(trainee, LABELLED, settings))
    train(trainee, LABELLED, settings, task="bob")
    torch.cuda.manual_seed(9)
    assert digest(train(trainee, LABELLED[::-1], settings)) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.model.state_dict().items())


RANK = """
import hashlib, sys
from pathlib import Path
import torch
from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.sift import sift

def digest(task):
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    examples = [Example(str(i), {"x": i}) for i in range(5)]
    def loss(model, batch):
        x = torch.tensor([[[example.fields["x"] + i + j / 16 for j in range(16)] for i in range(7)] for example in batch])
        return (model(x) - x.sin()).square().mean()
    vector = sift(model, examples, SiftSettings(learning_rate=1e-2, steps=4, batch_size=2, headroom=8), task=task, loss=loss)
    return hashlib.sha256(b"".join(vector.levels[name].numpy().tobytes() for name in sorted(vector.levels))).hexdigest()

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(rank + 1)
    for task in ["alice", "bob", "carol"][rank::2]:
        (folder / task).write_text(digest(task))
    torch.distributed.destroy_process_group()
"""


def test_two_processes_that_share_the_tasks_get_the_bits_of_one(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, tmp_path / "rank.py", tmp_path]
    ranks = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in ("0", "1")]
    for rank in ranks:
        complaint = rank.communicate()[1]
        assert rank.returncode == 0, complaint[-3000:]
    digest = runpy.run_path(str(tmp_path / "rank.py"))["digest"]
    found = [(tmp_path / task).read_text() for task in ("alice", "bob", "carol")]
    assert found == [digest(task) for task in ("alice", "bob", "carol")]
    assert len(set(found)) == 3
