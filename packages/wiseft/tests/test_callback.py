"""A training run leaves, beside each checkpoint, the same one interpolated; on two processes as on one."""

import json
import runpy
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from lmcore.models import tiny_llama
from wiseft.callback import WiseCallback
from wiseft.interpolate import interpolate_
from wiseft.merging import merge

TOKENS = torch.randint(0, 31, (16, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def train(out: Path, callback: WiseCallback, **options) -> Trainer:
    arguments = TrainingArguments(
        str(out), max_steps=6, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_total_limit=1, **options,
    )  # fmt: skip
    trainer = Trainer(tiny_llama(vocab_size=31), arguments, train_dataset=DATA, callbacks=[callback])
    trainer.train()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_each_checkpoint_appears_interpolated_with_the_first(tmp_path):
    seen = []

    def evaluate(folder: Path) -> dict[str, float]:
        seen.append(folder.name)
        return {"norm": float(weights(folder)["model.norm.weight"].norm())}

    trainer = train(tmp_path, WiseCallback(delta=0.25, evaluate=evaluate))
    assert seen == ["wise-4", "wise-6"]
    assert not (tmp_path / "checkpoint-2").exists(), "save_total_limit has deleted EARLY, which is kept"
    early, late, wise = (weights(tmp_path / name) for name in ("wise-early", "checkpoint-6", "wise-6"))
    for name, weight in wise.items():
        assert torch.equal(weight, (late[name].double() + 0.25 * (early[name].double() - late[name].double())).float())
    assert (tmp_path / "wise-6" / "config.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "wise.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    assert any("wise_norm" in entry for entry in trainer.state.log_history)


def test_early_may_be_a_checkpoint_of_another_run(tmp_path):
    tiny_llama(vocab_size=31, seed=9).save_pretrained(tmp_path / "given")
    train(tmp_path / "run", WiseCallback(tmp_path / "given"))
    assert sorted(path.name for path in (tmp_path / "run").glob("wise*")) == ["wise-2", "wise-4", "wise-6"]


RANK = """
import os
import torch
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments
from lmcore.models import tiny_llama
from wiseft.callback import WiseCallback
from wiseft.interpolate import interpolate_

os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
tokens = torch.load(folder / "tokens.pt", weights_only=True)
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(
    str(folder / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
)
Trainer(tiny_llama(vocab_size=31), arguments, train_dataset=data, callbacks=[WiseCallback()]).train()

model = tiny_llama(vocab_size=31)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
interpolate_(model, folder / "early", folder / "late", 0.3)
full = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
if torch.distributed.get_rank() == 0:
    torch.save(full, folder / "full.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, forks) -> Path:
    """A folder in which two gloo processes have trained with the callback and interpolated into a sharded model."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(TOKENS, folder / "tokens.pt")
    for seed, name in enumerate(["early", "late"]):
        tiny_llama(vocab_size=31, seed=seed).save_pretrained(folder / name)
    (folder / "rank.py").write_text(RANK)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    given = [{"folder": folder, "port": port, "rank": rank} for rank in "01"]
    ranks = [forks.start(runpy.run_path, str(folder / "rank.py"), each) for each in given]
    for rank in ranks:
        rank.join(timeout=120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder


def test_sharded_model_on_two_processes_gets_the_weights_of_one(two_processes):
    single = interpolate_(tiny_llama(vocab_size=31), two_processes / "early", two_processes / "late", 0.3).state_dict()
    sharded = torch.load(two_processes / "full.pt", weights_only=True)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_training_on_two_processes_writes_the_merge_of_its_checkpoints(two_processes, tmp_path):
    merge(two_processes / "run" / "checkpoint-2", two_processes / "run" / "checkpoint-4", tmp_path / "expected")
    found, expected = weights(two_processes / "run" / "wise-4"), weights(tmp_path / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_interpolate_equals_merge_and_refuses_what_does_not_fit(tmp_path):
    from lmcore.errors import UserError

    for seed, name in enumerate(["early", "late"]):
        tiny_llama(vocab_size=31, seed=seed, tie=True).save_pretrained(tmp_path / name)
    merge(tmp_path / "early", tmp_path / "late", tmp_path / "out", delta=0.3)
    model = tiny_llama(vocab_size=31, seed=5, tie=True)
    head = model.lm_head.weight
    assert interpolate_(model, tmp_path / "early", tmp_path / "late", 0.3) is model
    assert model.lm_head.weight is head, "in place"
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(model.state_dict()[name], weight)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wrong = {name: weight[:1] for name, weight in before.items()}
    with pytest.raises(UserError, match=r"the early checkpoint has \(1, 64\) for model\.embed_tokens\.weight"):
        interpolate_(model, wrong, before, 0.5)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
