"""A live model serves a task bit for bit as the store has it, and is the base again afterwards, whatever happened meanwhile."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lmcore.errors import UserError
from siftmasks.serving import Server, task
from siftmasks.settings import SiftSettings
from siftmasks.store import Store

from .conftest import random_vector

SCALES = ("mean", "count", "density")


@pytest.fixture
def store(trained, tmp_path) -> Store:
    return filled(trained.store(tmp_path / "store", policy="archive"))


@pytest.fixture
def model(trained):
    return AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)


def filled(store: Store, tasks: str = "ABC") -> Store:
    store._add((name, random_vector(store.config, ord(name))) for name in tasks)
    return store


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["sift", "signs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_serves_each_task_bit_for_bit_and_is_the_base_again(trained, tmp_path, mode, dtype):
    store = filled(trained.store(tmp_path / "store", mode=mode))
    model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=dtype)
    base, places = weights(model), {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for scale in SCALES:
        for name in ("A", "C", None):
            with task(store, name, model, scale) as served:
                assert served is model
                assert equal(weights(model), base | dict(store.weights(name, scale, dtype=dtype)))
                assert not equal(weights(model), base)
            assert equal(weights(model), base)
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}, "in the model's own tensors"


def test_a_store_without_tasks_serves_the_base(trained, model, tmp_path):
    base = weights(model)
    with task(trained.store(tmp_path / "store"), None, model):
        assert equal(weights(model), base)


def test_a_parameter_whose_memory_has_another_order_is_served_too(store, model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    with Server(store, model) as server:
        server.switch("A")
        assert not weight.is_contiguous()
        assert equal(weights(model), weights(model) | dict(store.weights("A")))


def test_a_switch_between_forward_and_backward_pass_is_an_error_and_not_a_wrong_gradient(store, model):
    ids = torch.arange(8)[None]
    with Server(store, model) as server:
        server.switch("A")
        loss = model(input_ids=ids, labels=ids).loss
        server.switch("B")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_brings_the_base_back(store, model, error):
    base = weights(model)
    with pytest.raises(error), task(store, "A", model):
        raise error
    assert equal(weights(model), base)


def test_what_training_does_to_a_served_model_is_undone(store, model):
    base, ids = weights(model), torch.arange(8)[None]
    with task(store, "A", model):
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in store.config.tensors], lr=1.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert equal(weights(model), base)


def test_one_model_serves_one_thing_at_a_time(store, model):
    base = weights(model)
    with task(store, "A", model):
        with pytest.raises(UserError, match="the model serves task 'A' already"), task(store, "B", model):
            pass
        with pytest.raises(UserError, match="the model serves task 'A' already"):
            Server(store, model)
        assert equal(weights(model), base | dict(store.weights("A")))
    with (
        Server(store, model),
        pytest.raises(UserError, match="the model serves a server's tasks already"),
        task(store, "B", model),
    ):
        pass
    with task(store, "B", model):
        assert equal(weights(model), base | dict(store.weights("B")))


def test_unknown_tasks_and_scales_leave_the_model_alone(store, model):
    base = weights(model)
    with pytest.raises(UserError, match="task 'D' is not in"), task(store, "D", model):
        pass
    assert equal(weights(model), base)
    with Server(store, model) as server:
        server.switch("A")
        with pytest.raises(UserError, match="task 'D' is not in"):
            server.switch("D")
        assert equal(weights(model), base)


def another_weight(model):
    model.model.layers[0].mlp.up_proj.weight.data[1, 2] += 1


def another_frozen_weight(model):
    model.lm_head.weight.data[1, 2] += 1


def another_shape(model):
    model.model.norm.weight = torch.nn.Parameter(torch.ones(5))


def one_name_less(model):
    del model.model.norm


def one_name_more(model):
    model.model.adapter = torch.nn.Linear(2, 2)


def no_device(model):
    model.model.norm.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_weight, "model.layers.0.mlp.up_proj.weight of the model is not that of the base"),
        (another_frozen_weight, "embed_tokens.weight|lm_head.weight of the model is not that of the base"),
        (another_shape, "model.norm.weight of the model has the shape [5], that of the base [16]"),
        (one_name_less, "the model lacks model.norm.weight"),
        (one_name_more, "the model has model.adapter.weight, which the base lacks"),
        (no_device, "model.norm.weight of the model is on no device"),
    ],
)
def test_a_model_that_is_not_the_base_is_refused(store, model, change, message):
    change(model)
    pattern = "|".join(re.escape(part) for part in message.split("|"))
    for use in (lambda: task(store, "A", model).__enter__(), lambda: Server(store, model)):
        with pytest.raises(UserError, match=pattern):
            use()


def test_a_base_that_has_moved_is_named(trained, model, tmp_path):
    base = shutil.copytree(trained.base, tmp_path / "base")
    path = filled(trained.store(tmp_path / "store", base)).path
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="open the store with base="), task(Store.open(path), "A", model):
        pass
    with task(Store.open(path, base=tmp_path / "moved"), "A", model):
        assert equal(weights(model), weights(model) | dict(Store.open(path, base=tmp_path / "moved").weights("A")))


def test_switching_again_and_again_gives_the_bits_of_each_task(store, model):
    base = weights(model)
    for scale in SCALES:
        with Server(store, model, scale=scale) as server:
            for name in ("A", "B", None, "C", "A"):
                server.switch(name)
                assert server.task == name
                assert equal(weights(model), base | dict(store.weights(name, scale)))
            server.restore()
            assert equal(weights(model), base)
            server.switch("B")
        assert equal(weights(model), base)
        server.close()
        with pytest.raises(ValueError, match="this server is closed"):
            server.switch("A")


def test_a_server_follows_the_store(store, model):
    base = weights(model)
    with Server(store, model) as server:
        server.switch("A")
        store.forget("A")
        with pytest.raises(UserError, match="task 'A' is not in"):
            server.switch("A")
        server.switch("B")
        assert equal(weights(model), base | dict(store.weights("B"))), "of two tasks now"
        filled(store, "D")
        server.switch("D")
        assert equal(weights(model), base | dict(store.weights("D")))


def test_a_damaged_mask_leaves_a_server_with_the_base(store, model):
    base = weights(model)
    with Server(store, model) as server:
        server.switch("A")
        path = store.path / "masks" / "B.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"B\.safetensors is damaged"):
            server.switch("B")
        assert equal(weights(model), base)
        server.switch("C")


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_a_task_takes_the_memory_of_a_few_tensors(tmp_path, unhurried):
    size, count = 2**18, 32
    model = torch.nn.ParameterDict({f"w{i}": torch.nn.Parameter(torch.randn(size)) for i in range(count)})
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    store = Store.init(
        tmp_path / "store", tmp_path / "base.safetensors", settings=SiftSettings(), trainable=[*model.state_dict()]
    )
    filled(store, "A")
    with task(store, "A", model):
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
    with task(store, "A", model):
        pass
    assert peak_memory() - before < 8 * 4 * size, f"a quarter of the {count} tensors"
