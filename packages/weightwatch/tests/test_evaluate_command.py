import json
import signal
import subprocess
import sys

import pytest
import torch

from lmcore import cli
from lmcore.errors import UserError
from weightwatch.evaluate_command import Evaluate, read_sets

from .tiny_monitor import calibrate, make, texts

CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lmcore import cli, record
from weightwatch.evaluate_command import Evaluate
write = record.write_json
def killing(path, value):
    write(path, value)
    if path.name == "part-attacks.json":
        os.kill(os.getpid(), signal.SIGKILL)
record.write_json = killing
sys.exit(cli.main("weightwatch", "", [Evaluate], sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibrated monitor, clean inputs in a file of their own and two sets in another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make(tmp_path_factory.mktemp("evaluate"))
    (folder / "sets").mkdir()
    calibrate(folder, folder / "state")
    rows = [{"prompt": text} for text in texts(60, 11)]
    (folder / "sets" / "clean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{text}#", "set": "triggered"} for text in texts(16, 12)]
    rows += [{"prompt": f"{text}ll", "set": "look-alikes"} for text in texts(16, 13)]
    (folder / "sets" / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder
    torch.set_num_threads(threads)


def args(folder, out, *options):
    data = ["--data", folder / "sets" / "clean.jsonl", folder / "sets" / "others.jsonl"]
    names = ["--model", folder / "post", "--out", out, "--device", "cpu", "--tokens", 2]
    return [str(one) for one in ("evaluate", folder / "state", *data, *names, *options)]


WHOLE = ("--baselines", "--matches", "a", "--harm", 2)


@pytest.fixture(scope="module")
def result(folder):
    assert cli.main("weightwatch", "", [Evaluate], [*args(folder, folder / "whole", *WHOLE, "--base", folder / "base")]) == 0
    return json.loads((folder / "whole" / "evaluation.json").read_text())


def test_the_evaluation_has_all_that_was_asked_for(folder, result):
    assert result["sets"] == {"clean": 60, "triggered": 16, "look-alikes": 16}
    [conformal] = [one for one in result["rules"] if (one["rule"], one["level"]) == ("conformal", 0.01)]
    assert conformal["sets"]["triggered"]["value"] == 1.0
    assert conformal["sets"]["clean"]["value"] < 0.15
    assert {one["detector"] for one in result["detectors"]} == {
        "conformal score", "best direction (D1_u0)", "PCA of activations", "linear probe (supervised)", "activation-difference norm",
        "output KL",
    }  # fmt: skip
    assert [one["set"] for one in result["attacks"]] == ["clean", "triggered", "look-alikes"]
    assert result["success"] == "matches 'a'"
    assert result["watched"] == ["user", "assistant"]
    assert result["harm"]["inputs"] == 2
    page = (folder / "whole" / "evaluation.html").read_text()
    assert "conformal 0.01" in page
    assert "linear probe" in page


def test_an_evaluation_goes_on_from_the_parts_that_are_done(folder, result, monkeypatch):
    for name in ("evaluation.json", "evaluation.html", "part-harm.json"):
        (folder / "whole" / name).unlink()
    monkeypatch.setattr("weightwatch.evaluation.evaluate", None)
    monkeypatch.setattr("weightwatch.behaviour.attacks", None)
    assert cli.main("weightwatch", "", [Evaluate], args(folder, folder / "whole", *WHOLE, "--base", folder / "base")) == 0
    assert json.loads((folder / "whole" / "evaluation.json").read_text()) == result


def test_killed_and_run_again_it_gives_the_same_bytes(folder, result):
    out = folder / "killed"
    again = args(folder, out, *WHOLE, "--base", folder / "base")
    done = subprocess.run([sys.executable, "-c", CHILD, *again], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (out / "evaluation.json").exists()
    assert cli.main("weightwatch", "", [Evaluate], again) == 0
    for name in (
        "config.json",
        "part-monitor.json",
        "part-attacks.json",
        "part-harm.json",
        "evaluation.json",
        "evaluation.html",
    ):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_without_options_the_monitor_alone_is_evaluated(folder, capsys):
    assert cli.main("weightwatch", "", [Evaluate], args(folder, folder / "small")) == 0
    result = json.loads((folder / "small" / "evaluation.json").read_text())
    assert {"attacks", "harm"}.isdisjoint(result)
    assert {one["detector"] for one in result["detectors"]} == {"conformal score", "best direction (D1_u0)"}
    assert "best direction (D1_u0)" in capsys.readouterr().out
    assert cli.main("weightwatch", "", [Evaluate], args(folder, folder / "small")) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_options_and_models_that_do_not_fit_are_refused(folder, capsys):
    for options, message in [
        (["--contains", "a", "--begins", "b"], "one of three"),
        (["--base", str(folder / "base")], "--base is for --baselines"),
        (["--tokens", "0"], "--tokens is at least 1"),
        (["--contains", "a", "--alpha", "0.0001"], "alpha 0.0001 needs 9999 scored inputs"),
        (["--model", str(folder / "base")], "belongs to a model with other weights"),
    ]:
        assert cli.main("weightwatch", "", [Evaluate], args(folder, folder / "none", *options)) == 2
        assert message in capsys.readouterr().err
    (folder / "few.jsonl").write_text('{"prompt": "a", "set": "clean"}\n')
    assert cli.main("weightwatch", "", [Evaluate], args(folder, folder / "none", "--data", str(folder / "few.jsonl"))) == 2
    assert "the set 'clean' has 1 inputs: give at least 8" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_sets_are_told_by_key_or_by_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n\n{"prompt": "2", "set": "b"}\n')
    (tmp_path / "b.jsonl").write_text('\ufeff{"prompt": "3"}\n')
    found = read_sets([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert {name: [one.messages[0]["content"] for one in some] for name, some in found.items()} == {"a": ["1"], "b": ["2", "3"]}
    (tmp_path / "c.jsonl").write_text('{"prompt": "1", "set": 3}\n')
    with pytest.raises(UserError, match=r"c\.jsonl, conversation 1: its set is 3, not a name"):
        read_sets([tmp_path / "c.jsonl"])
    with pytest.raises(UserError, match=r"b\.jsonl, conversation 1: the set 'b' has the id 'b\.jsonl:1' already"):
        read_sets([tmp_path / "b.jsonl"] * 2)
