"""An export is a plain model folder with the served weights, and tells what its dtype loses of the delta."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcore.checkpoint import Checkpoint, CheckpointWriter
from lmcore.errors import UserError
from lmcore.text import character_tokenizer
from siftmasks.export import export
from siftmasks.serving import task
from siftmasks.settings import SiftSettings
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
    forgot, never = (trained.store(tmp_path / name, base, policy="archive") for name in ("forgot", "never"))
    filled(forgot, "ABC").forget("B")
    filled(filled(never, "C"), "A")
    for name in ("A", None):
        for scale in ("mean", "count"):
            for number, store in enumerate((forgot, never)):
                threads = torch.get_num_threads()
                torch.set_num_threads(number + 1)
                export(store, name, tmp_path / store.path.name / "out" / f"{name}-{scale}", scale=scale) if False else export(
                    store, name, tmp_path / f"{store.path.name}-out" / f"{name}-{scale}", scale=scale
                )
                torch.set_num_threads(threads)
    assert contents(tmp_path / "forgot-out") == contents(tmp_path / "never-out")


def test_the_loss_of_a_delta_is_measured(small):
    """Against the definition, in float64, from what was written."""
    store = small.store("store", "AB")
    for dtype in (None, "float32", "bfloat16", "float16"):
        with pytest.warns(UserWarning, match="--dtype float32") if False else open(os.devnull):
            result = export(store, "A", small.folder / f"{dtype}", dtype=dtype)
