"""A batch of rows of different tasks gives each row what its task gives it alone, in one forward pass."""

import functools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)  # fmt: skip

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from siftmasks.mixed import mixed
from siftmasks.serving import task
from siftmasks.settings import SiftSettings
from siftmasks.store import Store

from .conftest import random_vector

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32; logits are of the order of 1, as is what a task does to them
ROWS = ["A", "B", None, "A"]
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS = {
    "llama": lambda: tiny_llama(vocab_size=32, hidden_size=32),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=32, **NO_IDS)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=32, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", **NO_IDS,
        )
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3)
    ),
}  # fmt: skip


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.fixture
def make(tmp_path, unhurried):
    """Save a model as a base, and fill a store over it."""

    def make(model: nn.Module, trainable=None, **settings) -> Store:
        model.save_pretrained(tmp_path / "base")
        settings = SiftSettings(**{"learning_rate": 1e-2, "steps": 5} | settings)
        store = Store.init(tmp_path / "store", tmp_path / "base", settings=settings, trainable=trainable, policy="archive")
        store._add((name, random_vector(store.config, ord(name))) for name in "ABC")
        return store

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small, and threads wait for each other on a busy machine
    yield make
    torch.set_num_threads(threads)


def batch_of(name: str, rows: int = 4) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32, (rows, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded on the left
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 32, (rows, 4), generator=random)
    return inputs


def alone(store: Store, model: nn.Module, rows, inputs, scale="mean", run=None) -> list:
    """Each row by itself, in a model that serves its task."""
    results = []
    for number, name in enumerate(rows):
        with task(store, name, model, scale), torch.no_grad():
            row = {key: value[number : number + 1] for key, value in inputs.items()}
            results.append(run(**row) if run else model(**row).logits)
    return results


@pytest.mark.parametrize(("name", "mode"), [*((name, "sift") for name in MODELS), ("gpt2", "signs"), ("t5", "signs")])
def test_each_row_gets_what_its_task_gives_it_alone(make, name, mode):
    model, inputs = model_of(name), batch_of(name)
    store = make(model, mode=mode)
    with torch.no_grad():
        base = model(**inputs).logits
    for scale in ("mean", "count", "density") if mode == "sift" else ("mean", "count"):
        expected = torch.cat(alone(store, model, ROWS, inputs, scale))
        assert (expected - base).abs().amax(tuple(range(1, base.ndim))).min() > 1e-3, "every row is moved by its task"
        with mixed(store, model, ROWS, scale=scale):
            served = model(**inputs).logits
        torch.testing.assert_close(served, expected, **TOLERANCE)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gpt2", {"num_beams": 3}), ("t5", {"num_beams": 3, "num_return_sequences": 2})],
    ids=str,
)
def test_rows_stay_with_their_tasks_while_text_is_generated(make, name, options):
    model, inputs = model_of(name), batch_of(name)
    inputs.pop("decoder_input_ids", None)
    store = make(model)
    run = functools.partial(model.generate, max_new_tokens=4, do_sample=False, **options)
    expected = alone(store, model, ROWS, inputs, "count", run)
    with mixed(store, model, ROWS, scale="count"):
        served = run(**inputs)
    assert torch.equal(served, torch.cat(expected))
    assert not torch.equal(served, run(**inputs)), "the base writes something else"


def first(inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return {key: value[:rows] for key, value in inputs.items()}


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_another_batch_has_other_tasks(make, mode):
    model, inputs = model_of("gpt2"), batch_of("gpt2")
    store = make(model, mode=mode)
    batches = [["C", "C"], [None], ["B", None, "A"], ROWS]
    expected = [torch.cat(alone(store, model, rows, inputs)) for rows in batches]
    with mixed(store, model, ["A"]) as batch:
        for rows, logits in zip(batches, expected, strict=True):
            batch.assign(rows)
            assert batch.tasks == rows
            torch.testing.assert_close(model(**first(inputs, len(rows))).logits, logits, **TOLERANCE)


@pytest.mark.parametrize(
    "trainable",
    [
        ["transformer.wte.weight"],  # tied to the head
        ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.ln_1.bias"],
        ["transformer.h.1.mlp.c_fc.weight"],
    ],
)
def test_whatever_is_trained_is_served(make, trainable):
    model, inputs = model_of("gpt2"), batch_of("gpt2")
    store = make(model, trainable)
    expected = torch.cat(alone(store, model, ROWS, inputs))
    with mixed(store, model, ROWS):
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("delta_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_its_rounding(make, dtype, delta_dtype):
    """The rows alone, in float32, are the truth; they are as far from it in half precision, each with its own merged weights."""
    model, inputs = model_of("llama"), batch_of("llama")
    store = make(model)
    truth = torch.cat(alone(store, model, ROWS, inputs))
    half = MODELS["llama"]()
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    merged = (torch.cat(alone(store, half, ROWS, inputs)).float() - truth).norm()
    with mixed(store, half, ROWS, delta_dtype=delta_dtype):
        logits = half(**inputs).logits
    assert logits.dtype == dtype
    assert (logits.float() - truth).norm() < 1.5 * merged < 0.05 * truth.norm()


def test_the_model_is_as_before(make):
    model, inputs = model_of("t5"), batch_of("t5")
    store = make(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        base = model(**inputs).logits
    with pytest.raises(KeyboardInterrupt), mixed(store, model, ROWS):
        assert not model(**inputs).logits.requires_grad, "no gradient flows through a delta"
        raise KeyboardInterrupt
    assert model(**inputs).logits.requires_grad
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert not any({"forward", "compute_bias"} & vars(module).keys() or module._forward_hooks for module in model.modules())
    with task(store, "A", model):
        pass


def test_rows_that_do_not_fit_the_tasks_are_refused(make):
    model, inputs = model_of("llama"), batch_of("llama")
    store = make(model)
    with (
        mixed(store, model, ["A", "B", "A"]),
        pytest.raises(UserError, match="given 4 rows, which is no multiple of the 3 tasks"),
    ):
        model(**inputs)


def test_bad_tasks_and_busy_models_are_refused(make):
    model = model_of("llama")
    store = make(model)
    for rows, message in ((["A", "D"], "task 'D' is not in"), ([], "no task is named")):
        with pytest.raises(UserError, match=message), mixed(store, model, rows):
            pass
    with mixed(store, model, ["A"]) as batch:
        with pytest.raises(UserError, match="the model serves a batch of tasks already"), mixed(store, model, ["B"]):
            pass
        with pytest.raises(UserError, match="task 'D' is not in"):
            batch.assign(["D"])
        store.forget("B")
        with pytest.raises(UserError, match="has changed since the batch began"):
            batch.assign(["A"])


def test_a_damaged_mask_stops_the_batch(make):
    model, inputs = model_of("gpt2"), first(batch_of("gpt2"), 1)
    store = make(model)
    expected = alone(store, model, ["C"], inputs)[0]
    path = store.path / "masks" / "B.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with mixed(store, model, ["A"]) as batch:
        with pytest.raises(UserError, match=r"B\.safetensors is damaged"):
            batch.assign(["B"])
        with pytest.raises(UserError, match="no multiple of the 0 tasks"):
            model(**inputs)
        batch.assign(["C"])
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)


def test_a_model_that_is_not_the_base_is_refused(make):
    store = make(model_of("llama"))
    other = tiny_llama(vocab_size=32, hidden_size=32, seed=1)
    with pytest.raises(UserError, match="of the model is not that of the base"), mixed(store, other, ["A"]):
        pass


def sequence_first() -> nn.Module:
    return XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16))


def mixture_of_experts() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, **NO_IDS,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"), [(sequence_first, "of type xlnet"), (mixture_of_experts, "a mixture of experts")]
)
def test_models_whose_rows_cannot_be_followed_are_refused(make, build, message):
    store = make(model_of("llama"))
    with pytest.raises(UserError, match=message), mixed(store, build(), ["A"]):
        pass


def test_a_position_embedding_without_rows_is_refused(make):
    model, inputs = model_of("gpt2"), batch_of("gpt2")
    store = make(model, ["transformer.wpe.weight"])
    with mixed(store, model, ROWS), pytest.raises(UserError, match="given 1 rows"):
        model(input_ids=inputs["input_ids"])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
        self.distances = nn.Embedding(4, 3)


@pytest.mark.parametrize("name", ["layers.0.gain", "layers.0.distances.weight"])
def test_parameters_that_have_no_rows_are_refused(tmp_path, unhurried, name):
    model = nn.ModuleDict({"layers": nn.ModuleList([Layer()])})
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    store = Store.init(tmp_path / "store", tmp_path / "base.safetensors", trainable=[name])
    with pytest.raises(UserError, match=f"{name} has no rows"), mixed(store, model, [None]):
        pass
