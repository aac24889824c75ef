import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from lmcore import cli
from lmcore.models import load_causal_lm
from weightwatch.calibration import Calibration
from weightwatch.conversations import read_conversations, tokenize
from weightwatch.scanning import scan
from weightwatch.state import State

from .tiny_monitor import COMMANDS, calibrate, calibrate_args, make, run

CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lmcore import cli
from weightwatch.calibrate_command import Calibrate
from weightwatch.calibration import Calibration
saves, save = int(sys.argv[1]), Calibration.save
def counted(self, path):
    global saves
    save(self, path)
    saves -= 1
    if saves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Calibration.save = counted
sys.exit(cli.main("weightwatch", "", [Calibrate], sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make(tmp_path_factory.mktemp("monitor"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(folder):
    calibrate(folder, folder / "whole")
    return folder / "whole"


def child(saves, args, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(saves), *map(str, args)],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_state_holds_the_calibration_of_all_conversations(folder, whole):
    state = State.open(whole)
    assert state.bank.labels == (("D1_u0",),)
    model, tokenizer = load_causal_lm(folder / "post")
    state.require(model)
    chats = [*tokenize(read_conversations(folder / "clean.jsonl"), tokenizer, max_length=256)]
    expected = Calibration(state.calibration.directions, 1)
    for place, peaks in scan(model, state.bank, chats, batch_tokens=256):
        expected.add([chats[i].id for i in place], peaks.low, peaks.high)
    expected.save(folder / "expected")
    assert (whole / "calibration.safetensors").read_bytes() == (folder / "expected").read_bytes()
    assert state.calibration.inputs == 300
    assert sorted(path.name for path in whole.iterdir()) == [
        "calibration.safetensors",
        "config.json",
        "directions",
        "environment.json",
    ]


def test_killed_and_run_again_it_gives_the_same_bytes(folder, whole):
    out, saves = folder / "killed", 2  # that of the empty part, and that after the first chunk
    process = child(saves, calibrate_args(folder, out))
    complaint = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, complaint[-3000:]
    [part] = out.glob("part-*")
    assert not (out / "calibration.safetensors").exists()
    before = Calibration.load(part, directions=State.open(whole).calibration.directions)
    assert before.inputs == 128
    calibrate(folder, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("calibration.safetensors", "config.json", "directions/directions.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_of_torchrun_write_the_bytes_of_one(folder, whole):
    out = folder / "shared"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [child(0, calibrate_args(folder, out), RANK=rank, **environment) for rank in "01"]
    for process in processes:
        complaint = process.communicate()[1]
        assert process.returncode == 0, complaint[-3000:]
    assert (out / "calibration.safetensors").read_bytes() == (whole / "calibration.safetensors").read_bytes()
    assert not [*out.glob("part-*")]


def test_a_finished_state_is_kept_unless_told_otherwise(folder, whole, capsys):
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, calibrate_args(folder, whole))]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    out = folder / "replaced"
    calibrate(folder, out)
    result = calibrate(folder, out, "--overwrite", "--skip-first", 2)
    assert json.loads((out / "config.json").read_text())["skip_first"] == 2
    assert result["inputs"] == 300


def test_a_state_is_of_one_model_in_one_dtype(folder, whole, capsys):
    for options, complaint in (
        (["--model", folder / "base"], "other weights"),
        (["--model", folder / "post", "--dtype", "bfloat16"], "float32"),
    ):
        args = ["scan", whole, "--data", folder / "clean.jsonl", "--device", "cpu", *options]
        assert cli.main("weightwatch", "", COMMANDS, [*map(str, args)]) == 2
        assert complaint in capsys.readouterr().err
    assert cli.main("weightwatch", "", COMMANDS, ["scan", str(folder), "--data", "x", "--model", "y"]) == 2
    assert "not a folder that weightwatch calibrate wrote" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tail", "--top", "--skip-first", "--drop-last"])
def test_numbers_that_mean_nothing_are_refused(folder, capsys, option):
    args = [*calibrate_args(folder, folder / "none"), option, "-1"]
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args)]) == 2
    assert option in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_text_for_people(folder, capsys):
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, calibrate_args(folder, folder / "shown"))]) == 0
    printed = capsys.readouterr().out
    assert "300 inputs (300 with user tokens, 300 with assistant tokens), 1 directions" in printed
    assert ["0.001", "1,998", "14,040", "1,999"] in [line.split() for line in printed.splitlines()]
    assert (
        run("scan", folder / "shown", "--model", folder / "post", "--data", folder / "clean.jsonl", "--alpha", 0.05)["inputs"]
        == 300
    )
