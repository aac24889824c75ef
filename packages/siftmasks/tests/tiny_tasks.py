"""A base model of a few thousand weights, saved as users have theirs, data of tasks for it, and the command line run in this process."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from siftmasks import cli

ALPHABET = "abcdefgh "
SHORT = ("--learning-rate", "1e-2", "--max-tasks", "20", "--max-length", "16")
QUICK = ("--steps", "3", *SHORT)


def save_base(folder: Path, seed: int = 0) -> Path:
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(task: str, count: int = 3) -> list[dict[str, str]]:
    """A task's examples: prompts that all tasks have, completions of its own."""
    own = ALPHABET[sum(task.encode()) % 8]
    return [{"id": f"{task}-{i}", "prompt": ALPHABET[i : i + 3], "completion": own * (i + 1)} for i in range(count)]


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_data(folder: Path, tasks: Iterable[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for task in tasks:
        write_jsonl(folder / f"{task}.jsonl", lines(task))
    return folder


class CommandLine:
    """`siftmasks ARGS`: `result` gives what --json prints, `refused` the one line of an error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        printed = self._capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    def result(self, *args: object) -> dict:
        code, out, err = self(*args, "--json")
        assert code == 0, err
        assert out.count("\n") == 1, "stdout holds one line of JSON and nothing else"
        return json.loads(out)

    def refused(self, *args: object) -> str:
        code, out, err = self(*args)
        assert (code, out) == (2, ""), err
        last = err.splitlines()[-1]
        assert last.startswith("siftmasks: ")
        assert "Traceback" not in err
        return last
