"""A checkpoint survives being read and written, a broken one is refused by name, and a killed writer leaves nothing loadable."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, copy_model_files, shards_like
from lmcore.errors import UserError
from lmcore.record import published

LONG_NAME = "model." + "layers.0." * 30 + "weight"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A real sharded bf16 model with tied weights, with an integer buffer, an empty tensor and a very long name added."""
    from lmcore.models import tiny_llama

    folder = tmp_path / "sharded"
    model = tiny_llama(vocab_size=97, tie=True).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB")
    extra = {
        "steps": torch.arange(7),
        "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        LONG_NAME: torch.randn(3, 5).bfloat16(),
    }
    save_file(extra, folder / "model-extra.safetensors", metadata={"format": "pt", "note": "naïve é\n"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in extra.values())
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def copy(source: Path, out: Path, *, piece: int = 1000) -> None:
    with Checkpoint.open(source) as checkpoint, published(out) as folder:
        index = checkpoint.index and checkpoint.index["metadata"]
        shards = shards_like(checkpoint)
        with CheckpointWriter(folder, shards, metadata=checkpoint.metadata, index_metadata=index) as writer:
            pieces = [(t, start) for t in checkpoint.tensors.values() for start in range(0, t.nbytes, piece)]
            random.Random(0).shuffle(pieces)
            for tensor, start in pieces:
                data = checkpoint.read(tensor.name, start, min(start + piece, tensor.nbytes))
                writer.write(tensor.name, start, data)


def test_sharded_checkpoint_survives_byte_for_byte(sharded, tmp_path):
    with Checkpoint.open(sharded) as checkpoint:
        assert len(checkpoint.metadata) > 2
        assert "lm_head.weight" not in checkpoint.tensors, "tied weights are saved once"
        assert checkpoint.tensors["empty"].shape == (0, 5)
        assert len(LONG_NAME) > 200
    copy(sharded, tmp_path / "copy")
    names = sorted(path.name for path in sharded.iterdir() if "safetensors" in path.name)
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (sharded / name).read_bytes(), name


def test_torch_view_equals_safetensors(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        for file in checkpoint.metadata:
            for name, expected in load_file(sharded / file).items():
                found = checkpoint.tensor(name)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)


def test_single_file_and_index_file_open(sharded, tmp_path):
    with Checkpoint.open(sharded / "model.safetensors.index.json") as checkpoint:
        assert "steps" in checkpoint.tensors
    with Checkpoint.open(sharded / "model-extra.safetensors") as checkpoint:
        assert set(checkpoint.tensors) == {"steps", LONG_NAME, "empty"}


@pytest.fixture
def model(sharded) -> Path:
    """A model folder with what may stand in one beside the weights."""
    kept = ("tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "qwen.tiktoken", "modeling.py")
    for name in (*kept, "trainer_state.json", "adapter_config.json", "recipe.json", "README.md", "training_args.bin"):
        (sharded / name).write_text(name)
    (sharded / "checkpoint.json").mkdir()
    return sharded


@pytest.mark.parametrize("source", [".", "model.safetensors.index.json"])
def test_model_files_are_copied_without_weights_and_what_tells_of_others(source, model, tmp_path):
    (tmp_path / "out").mkdir()
    with Checkpoint.open(model / source) as checkpoint:
        copy_model_files(checkpoint, tmp_path / "out", leave=["recipe.json"])
    kept = {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"qwen.tiktoken", "modeling.py"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_dtype_takes_the_place_of_that_in_the_config(model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "bfloat16", "limit": float("inf")}
    (model / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(model) as checkpoint:
        copy_model_files(checkpoint, tmp_path, "float16")
        found = json.loads((tmp_path / "config.json").read_text())
        assert found == {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float16"}
        for text in ("{", "[]", "3"):
            (model / "config.json").write_text(text)
            with pytest.raises(UserError, match=r"sharded: config\.json cannot be read"):
                copy_model_files(checkpoint, tmp_path, "float16")


def test_a_loose_file_brings_model_files_only_if_it_is_named_as_part_of_a_model(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for name, brought in (("vectors.safetensors", []), ("model.safetensors", ["config.json"])):
        save_file({"weight": torch.zeros(2)}, tmp_path / name)
        with Checkpoint.open(tmp_path / name) as checkpoint:
            copy_model_files(checkpoint, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == brought


def write_raw(path: Path, header: str, data: bytes) -> Path:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, count: int | None = None) -> str:
    return json.dumps(
        {"dtype": "F32", "shape": [(stop - start) // 4 if count is None else count], "data_offsets": [start, stop]}
    )


BROKEN = {
    "truncated": (f'{{"first":{entry(0, 8)},"second":{entry(8, 24)}}}', 16, "second", "truncated"),
    "overlapping": (f'{{"first":{entry(0, 8)},"second":{entry(4, 12)}}}', 12, "second", "overlaps"),
    "duplicate name": (f'{{"first":{entry(0, 8)},"first":{entry(8, 16)}}}', 16, "first", "twice"),
    "wrong offset": (f'{{"first":{entry(0, 8)},"second":{entry(8, 16, 5)}}}', 16, "second", "offsets"),
    "hole": (f'{{"first":{entry(0, 8)},"second":{entry(12, 16)}}}', 16, "second", "unnamed bytes"),
    "trailing bytes": (f'{{"first":{entry(0, 8)}}}', 12, "first", "ends at byte 8"),
    "backward": (f'{{"first":{json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [8, 4]})}}}', 8, "first", "offsets"),
    "unknown dtype": ('{"first":{"dtype":"Q4","shape":[2],"data_offsets":[0,1]}}', 1, "first", "Q4"),
    "fractional shape": ('{"first":{"dtype":"F32","shape":[0.5],"data_offsets":[0,2]}}', 2, "first", "whole numbers"),
    "dtype that is a list": ('{"first":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}', 8, "first", "dtype"),
    "missing offsets": ('{"first":{"dtype":"F32","shape":[2]}}', 8, "first", "data_offsets"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', 0, "", "table of texts"),
    "metadata as a list": ('{"__metadata__":[1]}', 0, "", "header"),
    "not JSON": ("{nonsense", 0, "", "header"),
    "a list": ("[1, 2]", 0, "", "header"),
    "nested too deeply": ("[" * 100_000, 0, "", "header"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_file_is_refused_by_file_and_tensor(fault, tmp_path):
    header, size, tensor, words = BROKEN[fault]
    path = write_raw(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(UserError) as raised:
        Checkpoint.open(path)
    assert str(path) in str(raised.value)
    assert tensor in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("length", [0, 5, 8, 100, 5000])
def test_file_cut_anywhere_is_refused(length, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2000)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_faults_between_shards_and_index_are_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    good = path.read_text()

    def with_map(**changes):
        index = json.loads(good)
        index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v}
        path.write_text(json.dumps(index))
        with pytest.raises(UserError) as raised:
            Checkpoint.open(sharded)
        return str(raised.value)

    assert "tensor steps is in model-extra.safetensors, though model.safetensors.index.json names none" in with_map(steps=None)
    assert "tensor invented is in no shard, though" in with_map(invented="model-extra.safetensors")
    assert "shard is missing" in with_map(invented="model-none.safetensors")
    first = json.loads(good)["weight_map"]["model.norm.weight"]
    assert f"tensor steps is in model-extra.safetensors, though {path.name} names {first}" in with_map(steps=first)
    path.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"steps": torch.zeros(1)}, sharded / "model-again.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["other"] = "model-again.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="tensor steps is in"):
        Checkpoint.open(sharded)


def test_folder_without_safetensors_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        Checkpoint.open(tmp_path)


def test_a_hub_id_is_read_from_the_cache_or_else_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, *, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        if not local_files_only:
            save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for _ in range(2):
        with Checkpoint.open("owner/model") as checkpoint:
            assert list(checkpoint.tensors) == ["weight"]
    assert asked == [("owner/model", True), ("owner/model", False), ("owner/model", True)], "a tokenizer alone is not the model"


def test_writer_refuses_what_lies_outside_a_tensor(tmp_path):
    spec = TensorInfo("weight", "F32", (4,), tmp_path, 0)
    with CheckpointWriter(tmp_path, {"model.safetensors": [spec]}) as writer:
        with pytest.raises(ValueError, match="16 bytes"):
            writer.write("weight", 8, np.zeros(3, np.float32))
        writer.write("weight", 0, np.arange(4, dtype=np.float32))
    assert load_file(tmp_path / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3]


def test_unsealed_checkpoint_cannot_be_loaded(tmp_path):
    spec = TensorInfo("weight", "F32", (4,), tmp_path, 0)
    with pytest.raises(RuntimeError, match="halfway"), CheckpointWriter(tmp_path, {"model.safetensors": [spec]}) as writer:
        writer.write("weight", 0, np.zeros(4, np.float32))
        raise RuntimeError("halfway")
    with pytest.raises(UserError, match="unfinished"):
        Checkpoint.open(tmp_path)


STREAM_TWO_GB = """
import sys
from pathlib import Path
import numpy as np
from lmcore.checkpoint import Checkpoint, CheckpointWriter, shards_like
from lmcore.record import published

def peak_kib():
    # all resident memory, so an upper bound of the anonymous part
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = peak_kib()
with Checkpoint.open(folder / "big") as source, published(folder / "copy") as out:
    with CheckpointWriter(out, shards_like(source)) as writer:
        for tensor in source.tensors.values():
            for start in range(0, tensor.nbytes, 2**24):
                stop = min(start + 2**24, tensor.nbytes)
                writer.write(tensor.name, start, source.read(tensor.name, start, stop))
assert "torch" not in sys.modules
print(peak_kib() - before)
"""


def test_streaming_two_gigabytes_stays_under_300_megabytes(tmp_path):
    specs = [TensorInfo(f"layers.{i}.weight", "BF16", (1024, 131072), tmp_path, 0) for i in range(8)]
    (tmp_path / "big").mkdir()
    with CheckpointWriter(tmp_path / "big", {"model.safetensors": specs}):
        pass
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 2 * 2**30
    done = subprocess.run([sys.executable, "-c", STREAM_TWO_GB, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 300e6


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
import numpy as np
from lmcore.checkpoint import Checkpoint, CheckpointWriter, shards_like
from lmcore.record import published

source, out = map(Path, sys.argv[1:])
print("ready", flush=True)
with Checkpoint.open(source) as checkpoint, published(out, overwrite=True) as folder:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    index = checkpoint.index["metadata"]
    with CheckpointWriter(folder, shards_like(checkpoint), metadata=checkpoint.metadata, index_metadata=index) as writer:
        for tensor in checkpoint.tensors.values():
            for start in range(0, tensor.nbytes, 4096):
                writer.write(tensor.name, start, checkpoint.read(tensor.name, start, min(start + 4096, tensor.nbytes)))
                time.sleep(0.0005)
"""


def test_killed_writer_never_leaves_a_folder_that_loads_as_complete(sharded, tmp_path):
    from transformers import AutoModelForCausalLM

    truth = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", WRITE_SLOWLY, sharded, work / "out"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    subprocess.run(["rm", "-r", work / "out"], check=True)
    moments = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for folder in work.iterdir():
            try:
                loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            except Exception:
                assert folder.name.startswith("."), "what stands under the final name is complete"
                continue
            assert all(torch.equal(loaded[name], truth[name]) for name in truth), folder
    subprocess.run(command, check=True, capture_output=True)
    assert os.listdir(work) == ["out"], "the next run clears what the killed ones left"
