"""A command prints its result, turns a UserError into one line, and keeps stdout clean for JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcore import claims, cli
from lmcore.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Double(cli.Command):
    """Double a number."""

    number: int
    """The number."""

    def run(self) -> dict:
        print("a library says something")
        if self.number < 0:
            raise UserError(f"line 3: {self.number} is\nnegative")
        if self.number == 13:
            raise KeyboardInterrupt
        return {"doubled": 2 * self.number}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline(cli.HeadlineCommand):
    """Test the claims."""

    def claims(self, out: Path) -> tuple[str, list]:
        with open(out / "attempts", "a") as attempts:
            attempts.write("x")
        if self.seed == 13 and (out / "attempts").read_text() == "x":
            raise KeyboardInterrupt
        claim = claims.judge(id="a", statement="A holds.", effects=[1.0, 1.1], unit="points", seeds=[0, 1])
        return "example", [claim]


def call(*args: str) -> int:
    return cli.main("example", "An example.", [Double, Headline], args)


def test_result_is_printed_for_people_or_as_one_json_object(capsys):
    assert call("double", "--number", "4") == 0
    assert "doubled: 8" in capsys.readouterr().out
    assert call("double", "--number", "4", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"doubled": 8}
    assert "a library says something" in printed.err


def test_user_error_is_one_line_and_exit_status_2(capsys):
    assert call("double", "--number", "-1") == 2
    assert capsys.readouterr().err == "example: line 3: -1 is negative\n"
    with pytest.raises(SystemExit) as raised:
        call("double", "--number", "four")
    assert raised.value.code == 2


def test_interruption_says_how_to_go_on(capsys):
    assert call("double", "--number", "13") == 130
    assert "run the same command again" in capsys.readouterr().err


def test_warnings_are_one_line_of_the_program(capsys):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Warn(cli.Command):
        """Warn."""

        def run(self) -> dict:
            import warnings

            warnings.warn("rows differ", stacklevel=1)
            return {}

    assert cli.main("example", "An example.", [Warn, Double], ["warn"]) == 0
    assert capsys.readouterr().err == "example: warning: rows differ\n"


def test_a_table_that_is_piped_keeps_every_cell_on_one_line_and_has_numbers_at_the_right(capsys):
    words = "a statement in [bold] words :smile: " * 20
    rows = [{"name": words, "Pass@8": "9.10%", "interval": "[8.1, 10.2]"}, {"name": "b", "Pass@8": "12.00%", "interval": "-"}]
    cli.print_table(rows)
    width = len(words)
    assert capsys.readouterr().out.splitlines() == [
        f"{'name':<{width}}  Pass@8     interval",
        f"{words}   9.10%  [8.1, 10.2]",
        f"{'b':<{width}}  12.00%            -",
    ]
    cli.print_table([])
    assert capsys.readouterr().out == ""


SHOW = """
import sys
from lmcore.cli import print_table
print_table([{"name": "word " * 30, "value": "12.5"}])
"""


def test_a_table_on_a_terminal_fits_into_it_and_loses_nothing():
    leader, follower = os.openpty()
    environment = os.environ | {"COLUMNS": "40", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SHOW], stdout=follower, env=environment, check=True)
    os.close(follower)
    _, first, *others = os.read(leader, 10_000).decode().splitlines()
    os.close(leader)
    assert first.rstrip().endswith("12.5")
    assert max(map(len, [first, *others])) <= 40
    assert " ".join([first, *others]).split().count("word") == 30


def test_bars_of_transformers_stay_out_of_a_log(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert call("double", "--number", "4") == 0
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1", "stderr is no terminal here"


def test_interrupted_headline_is_continued_and_a_finished_one_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("headline", "--out", str(out), "--seed", "13") == 130
    assert call("headline", "--out", str(out)) == 2
    assert "other options" in capsys.readouterr().err
    assert call("headline", "--out", str(out), "--seed", "13") == 0
    assert (out / "attempts").read_text() == "xx", "what the interrupted run left is still there"
    assert call("headline", "--out", str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("headline", "--out", str(out), "--overwrite") == 0
    assert (out / "attempts").read_text() == "x"


def test_headline_does_not_touch_a_folder_that_it_did_not_write(tmp_path, capsys):
    for name in ("claims.json", "thesis.txt"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        assert call("headline", "--out", str(out), "--overwrite") == 2
        assert [path.name for path in out.iterdir()] == [name]
    assert "or other files" in capsys.readouterr().err


def test_headline_prints_the_agreed_json(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("headline", "--out", str(out), "--scale", "smoke", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "claims.json").read_text())
    assert result["scale"] == "smoke"
    assert result["seeds"] == [0, 1]
    keys = {"id", "statement", "published", "measured", "interval", "seeds", "verdict", "rule"}
    assert set(result["claims"][0]) == keys
    with pytest.raises(SystemExit) as raised:
        call("headline", "--out", str(out), "--scale", "tiny")
    assert raised.value.code == 2
