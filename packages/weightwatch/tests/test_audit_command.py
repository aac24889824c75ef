import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from lmcore import cli
from weightwatch.audit_command import Audit

from .tiny_monitor import make, texts, write

CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lmcore import cli
from weightwatch.audit_command import Audit
from weightwatch.top_tokens import TopTokens
saves, save = int(sys.argv[1]), TopTokens.save
def counted(self, path):
    global saves
    save(self, path)
    saves -= 1
    if saves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
TopTokens.save = counted
sys.exit(cli.main("weightwatch", "", [Audit], sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make(tmp_path_factory.mktemp("audit"))
    prompts = texts(300, 3)
    for i in range(0, 300, 20):
        prompts[i] = prompts[i] + "#"
    prompts[7] = prompts[8]
    write(folder / "corpus.jsonl", prompts)
    assert cli.main("weightwatch", "", [Audit], [*args(folder, folder / "whole"), "--json"]) == 0
    yield folder
    torch.set_num_threads(threads)


def args(folder, out, *options):
    names = ["--model", folder / "post", "--data", folder / "corpus.jsonl", "--out", out, "--drop-last", 1, "--device", "cpu"]
    return [str(one) for one in ("audit", folder / "directions", *names, *options)]


def test_the_planted_trigger_stands_out_in_what_is_written(folder, capsys):
    content = json.loads((folder / "whole" / "audit.json").read_text())
    assert (content["inputs"], content["duplicates"]) == (299, 1)
    [direction] = content["directions"]
    assert direction["label"] == "D1_u0"
    assert len(direction["raises"]) == len(direction["lowers"]) == 8
    words = {end["side"]: [one["word"] for one in end["keywords"]] for end in direction["ends"]}
    assert ["#"] in words.values()
    [end] = [end for end in direction["ends"] if words[end["side"]] == ["#"]]
    assert {one["token"] for one in end["transcripts"]} == {"#"}
    assert {int(one["id"].split()[1]) % 20 for one in end["transcripts"]} == {0}
    page = (folder / "whole" / "audit.html").read_text()
    assert "D1_u0" in page
    assert "299 inputs of corpus.jsonl" in page


def test_killed_and_run_again_it_gives_the_same_bytes(folder):
    out = folder / "killed"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "2", *args(folder, out)], env=os.environ, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (out / "audit.json").exists()
    assert cli.main("weightwatch", "", [Audit], args(folder, out)) == 0
    for name in ("audit.json", "audit.html", "top_tokens.safetensors", "config.json"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_what_exists_is_kept_unless_told_otherwise(folder, capsys):
    out = folder / "kept"
    shutil.copytree(folder / "whole", out)
    assert cli.main("weightwatch", "", [Audit], args(folder, out)) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert cli.main("weightwatch", "", [Audit], args(folder, out, "--overwrite", "--top", "4")) == 0
    assert json.loads((out / "audit.json").read_text())["top"] == 4
    (out / "audit.json").unlink()  # begun, not finished: goes on with the same options alone
    assert cli.main("weightwatch", "", [Audit], args(folder, out)) == 2
    assert "other options" in capsys.readouterr().err
    other = folder / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert cli.main("weightwatch", "", [Audit], args(folder, other, "--overwrite")) == 2
    assert (other / "mine.txt").exists()


def test_options_that_do_not_fit_together_are_refused(folder, capsys):
    for options, message in [
        (["--endpoint", "http://localhost:1/v1"], "--endpoint and --endpoint-model belong together"),
        (["--endpoint-key", "KEY"], "--endpoint-key needs both"),
        (["--top", "0"], "at least 1"),
        (["--drop-last", "-1"], "--drop-last is at least 0"),
    ]:
        assert cli.main("weightwatch", "", [Audit], args(folder, folder / "none", *options)) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "none").exists()
