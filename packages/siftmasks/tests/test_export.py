"""An export is a plain model folder with the served weights, and tells what its dtype loses of the delta."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcore.checkpoint import Checkpoint, CheckpointWriter
from lmcore.errors import UserError
from lmcore.text import character_tokenizer
from siftmasks.bits import unpack_bits
from siftmasks.export import export
from siftmasks.serving import task
from siftmasks.signs import sign_vector
from siftmasks.store import Store

from .conftest import contents, random_vector

QUIET = pytest.mark.filterwarnings("ignore:rounding to this dtype loses")


@pytest.fixture
def base(trained, tmp_path):
    """A base with a tokenizer, in several shards."""
    folder = tmp_path / "base"
    trained.model.save_pretrained(folder, max_shard_size="8KB")
    character_tokenizer("abcdefghij").save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture
def store(trained, base, tmp_path) -> Store:
    return filled(trained.store(tmp_path / "store", base, policy="archive"), "ABC")


def filled(store: Store, tasks: str) -> Store:
    store._add((name, random_vector(store.config, ord(name))) for name in tasks)
    return store


def exported_weights(folder) -> dict[str, torch.Tensor]:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.mark.parametrize("scale", ["mean", "count", "density"])
@pytest.mark.parametrize("name", ["A", None])
def test_transformers_loads_the_model_that_is_served(trained, store, base, tmp_path, name, scale):
    result = export(store, name, tmp_path / "out", scale=scale)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(8)[None]
    with torch.no_grad(), task(store, name, trained.model, scale):
        assert torch.equal(model(ids).logits, trained.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc") == AutoTokenizer.from_pretrained(base)("abc")
    names = {path.name for path in base.iterdir()} - {"trainer_state.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"siftmasks.json", "README.md"}
    with Checkpoint.open(tmp_path / "out") as out, Checkpoint.open(base) as old:
        assert {n: (i.file.name, i.dtype, i.shape) for n, i in out.tensors.items()} == {
            n: (i.file.name, i.dtype, i.shape) for n, i in old.tensors.items()
        }
        assert len(out.metadata) > 2
        assert result["tensors"] == len(out.tensors)
        assert result["bytes"] == sum(info.nbytes for info in out.tensors.values())


@QUIET
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_are_rounded_once_to_the_dtype_that_is_asked_for(store, base, tmp_path, dtype):
    export(store, "B", tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    expected = {name: weight.to(wanted) for name, weight in exported_weights(base).items()}
    expected |= dict(store.weights("B", dtype=wanted))
    weights = exported_weights(tmp_path / "out")
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == wanted and torch.equal(weights[name], expected[name]) for name in weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted


def test_the_card_and_the_record_say_what_was_exported(store, tmp_path):
    result = export(store, "A", tmp_path / "out", scale="count")
    record = json.loads((tmp_path / "out" / "siftmasks.json").read_text())
    assert record == {key: result[key] for key in record}
    assert (record["task"], record["scale"], record["dtype"], record["tasks"]) == ("A", "count", None, 3)
    assert (record["store"], record["base"]) == (store.digest(), store.config.base)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(text in card for text in (store.digest(), store.config.base, 'task `"A"`', "| scale | count |"))
    assert "without a mask" in (export(store, None, tmp_path / "none") and (tmp_path / "none" / "README.md").read_text())


def test_stores_of_equal_digests_export_equal_files(trained, base, tmp_path):
    """Learned in another order, one of them with a task that it forgot."""
    before = torch.get_num_threads()
    forgot, never = (trained.store(tmp_path / name, base, policy="archive") for name in ("forgot", "never"))
    filled(forgot, "ABC").forget("B")
    filled(filled(never, "C"), "A")
    for store, threads in ((forgot, 1), (never, 2)):
        torch.set_num_threads(threads)
        for name in ("A", None):
            export(store, name, tmp_path / f"{store.path.name}-{name}", scale="count")
    torch.set_num_threads(before)
    for name in ("A", None):
        assert contents(tmp_path / f"forgot-{name}") == contents(tmp_path / f"never-{name}")


@QUIET
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_is_that_of_what_was_written(small, dtype):
    """The weights themselves tell: base 1 everywhere, so that the exact delta is what float64 adds to it."""
    save_file({"a": torch.ones(2000), "b": torch.ones(3, 50).bfloat16()}, small.base)
    store = small.store("store", "ABC", bits=16)
    snapshot, grid = store.snapshot(), store.config.settings.grid
    result = export(store, "A", small.folder / "out", dtype=dtype)
    unchanged = count = lost = energy = 0
    for name, written in load_file(small.folder / "out" / "base.safetensors").items():
        mask = unpack_bits(snapshot.mask("A", name), written.numel()).view(written.shape)
        sign = sign_vector(0, name, written.shape)
        delta = sign * mask * snapshot.ledger("total", name).double() * grid.step / 3
        moved = written.double() - 1
        unchanged += int(((delta != 0) & (moved == 0)).sum())
        count += int((delta != 0).sum())
        lost, energy = lost + float((moved - delta).square().sum()), energy + float(delta.square().sum())
    assert result["loss"]["exported"] == result["loss"][dtype]
    assert result["loss"][dtype]["unchanged"] == unchanged / count
    assert result["loss"][dtype]["energy_lost"] == pytest.approx(lost / energy, rel=1e-3)
    assert (unchanged / count > 0.5) == (dtype == "bfloat16")


def test_a_delta_that_bfloat16_swallows_is_warned_of(trained, tmp_path):
    """The learning rate of the paper's Sent140 on a base in bfloat16."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.bfloat16).save_pretrained(base)
    store = filled(trained.store(tmp_path / "store", base, learning_rate=1e-7), "ABC")
    with pytest.warns(UserWarning, match=r"loses .* of the delta's squared length: export with --dtype float32"):
        result = export(store, "A", tmp_path / "out")
    assert len(result["warnings"]) == 1
    assert result["loss"]["exported"]["unchanged"] > 0.99
    assert result["loss"]["exported"]["energy_lost"] > 0.9
    assert result["loss"]["float32"]["energy_lost"] < 0.01
    assert export(store, "A", tmp_path / "float32", dtype="float32")["warnings"] == []


def test_a_weight_that_float16_does_not_hold_is_refused(small):
    save_file({"a": torch.full((4,), 1e5), "b": torch.ones(3), "frozen": torch.ones(3)}, small.base)
    store = small.store("store", "A")
    with pytest.raises(UserError, match="a has weights that F16 does not hold: choose another dtype"):
        export(store, "A", small.folder / "out", dtype="float16")
    assert not (small.folder / "out").exists()
    assert export(store, "A", small.folder / "out")["loss"]["float16"]["energy_lost"] is None


def test_a_store_without_tasks_exports_the_base(small):
    result = export(small.store(), None, small.folder / "out")
    assert contents(small.folder / "out")["base.safetensors"] == small.base.read_bytes()
    assert result["loss"]["exported"] == {"unchanged": 0.0, "energy_lost": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "D"}, "task 'D' is not in"),
        ({"dtype": "int8"}, "dtype int8: choose one of float32, bfloat16, float16"),
        ({"out": "there"}, "there exists: choose another --out or pass --overwrite"),
        ({"out": "there", "overwrite": True}, "there is no earlier export"),
        ({"out": "a file", "overwrite": True}, "a file is no earlier export"),
        ({"out": "store/out"}, "would write into .*store"),
        ({"out": ".", "overwrite": True}, "would write into .*store"),
        ({"out": "base/out"}, "would write into .*base"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(store, tmp_path, arguments, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    before = contents(tmp_path)
    arguments = {"task": "A", "out": "out"} | arguments
    out = tmp_path / arguments.pop("out")
    with pytest.raises(UserError, match=message):
        export(store, arguments.pop("task"), out, **arguments)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_replaced_if_asked(store, tmp_path):
    export(store, "A", tmp_path / "out")
    export(store, "B", tmp_path / "out", overwrite=True)
    export(store, "B", tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_base_that_has_moved_is_named(store, base, tmp_path):
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="open the store with base="):
        export(Store.open(store.path), "A", tmp_path / "out")
    export(Store.open(store.path, base=tmp_path / "moved"), "A", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_export_leaves_what_was_there(store, tmp_path, monkeypatch, overwrite):
    export(store, "A", tmp_path / "fresh")
    if overwrite:
        shutil.copytree(tmp_path / "fresh", tmp_path / "out")
    before = contents(tmp_path / "out")
    write, written = CheckpointWriter.write, []

    def killed(*arguments):
        written.append(write(*arguments))
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(CheckpointWriter, "write", killed)
        export(store, "B", tmp_path / "out", overwrite=overwrite)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out").exists() == overwrite
    export(store, "A", tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not [*tmp_path.glob(".out*")]
