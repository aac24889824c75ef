import json

import pytest

from lmcore import cli
from weightwatch.growing import growing

from .tiny_monitor import COMMANDS, calibrate, make, run, texts, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("monitor"))
    calibrate(folder, folder / "state")
    prompts = texts(140, 3)
    for i in (5, 77, 131):
        prompts[i] = prompts[i][:3] + "#" + prompts[i][3:]
    write(folder / "mixed.jsonl", prompts, texts(140, 6))
    return folder


def args(folder, *options):
    return ["scan", folder / "state", "--model", folder / "post", "--data", folder / "mixed.jsonl", "--device", "cpu", *options]


def test_verdicts_name_the_input_its_token_and_its_direction(folder):
    out = folder / "verdicts.jsonl"
    result = run(*args(folder, "--out", out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"chat {i}" for i in range(140)]
    flagged = [row["id"] for row in rows if row["flagged"]]
    assert {"chat 5", "chat 77", "chat 131"} <= {*flagged}
    assert len(flagged) <= 6
    assert (result["inputs"], result["flagged"]) == (140, len(flagged))
    assert result["verdicts"] == [row for row in rows if row["flagged"]]
    for row in rows:
        assert row["flagged"] == (row["p_value"] <= 0.01) == bool(row["events"])
    [event] = rows[5]["events"]
    assert (event["label"], event["text"], event["position"], event["role"]) == ("D1_u0", "#", 3, "user")
    assert event["margin"] == pytest.approx(abs(event["cosine"] - event["bound"]))
    assert result["drift"] == {"alarms": [], "blocks": 1, "why": None}


def test_a_scan_that_was_stopped_goes_on_to_the_same_file(folder, monkeypatch):
    """Stopped while the second chunk is written, in the middle of its line."""
    whole, out = folder / "whole.jsonl", folder / "stopped.jsonl"
    run(*args(folder, "--out", whole))
    from weightwatch import scanning

    ordinary = scanning.peaks_of
    calls = []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ordinary(*args, **options)

    monkeypatch.setattr(scanning, "peaks_of", stopping)
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args(folder, "--out", out))]) == 130
    assert not out.exists()
    hidden = folder / ".stopped.jsonl.unfinished"
    with open(hidden, "a") as file:
        file.write('[{"id": "chat 128", "fla')
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args(folder, "--out", out, "--alpha", 0.05))]) == 2  # other options
    calls += [1]
    assert run(*args(folder, "--out", out))["inputs"] == 140
    assert len(calls) == 4  # the second chunk alone was read again
    assert out.read_bytes() == whole.read_bytes()
    assert not hidden.exists()


def test_inputs_of_another_kind_raise_the_drift_alarm(folder, capsys):
    write(folder / "other.jsonl", [text.replace("a", "#") for text in texts(200, 4)], texts(200, 5))
    other = [*map(str, args(folder, "--rule", "minmax"))]
    other[other.index(str(folder / "mixed.jsonl"))] = str(folder / "other.jsonl")
    assert cli.main("weightwatch", "", COMMANDS, other) == 0
    shown = capsys.readouterr().out
    assert "drift: the scores of block 0" in shown
    assert "D1_u0" in shown


def test_what_is_read_is_never_written_into(folder, capsys):
    before = (folder / "mixed.jsonl").read_bytes()
    for out in (folder / "mixed.jsonl", folder / "state" / "verdicts.jsonl"):
        for command in ("scan", "generate"):
            words = [command, *args(folder, "--out", out, "--overwrite")[1:]]
            assert cli.main("weightwatch", "", COMMANDS, [*map(str, words)]) == 2
            assert "would write into the input" in capsys.readouterr().err
    assert (folder / "mixed.jsonl").read_bytes() == before


def test_a_growing_file_is_refused_where_it_would_lose_something(tmp_path):
    out = tmp_path / "rows.jsonl"
    with growing(out, {"a": 1}) as file:
        file.add([{"x": "é"}])
    assert out.read_text() == '{"x": "é"}\n'
    with pytest.raises(Exception, match="pass --overwrite"), growing(out, {"a": 1}):
        pass
    with (
        growing(out, {"a": 1}, overwrite=True) as file,
        pytest.raises(Exception, match="another process"),
        growing(out, {}, overwrite=True),
    ):
        pass
    with pytest.raises(Exception, match="cannot be written"), growing(tmp_path / "no" / "rows", {}):
        pass


def test_a_role_that_was_never_calibrated_is_told_of(folder, capsys):
    write(folder / "prompts.jsonl", texts(40, 9))
    calibrate(folder, folder / "prompts-state", "--data", folder / "prompts.jsonl")
    for command, data, warned in (("scan", "mixed", True), ("scan", "prompts", False), ("generate", "prompts", True)):
        options = ["--model", folder / "post", "--data", folder / f"{data}.jsonl", "--rule", "minmax", "--device", "cpu"]
        options += ["--max-new-tokens", 2] * (command == "generate")
        result = run(command, folder / "prompts-state", *options)
        assert ("no input of the calibration has tokens of the assistant" in capsys.readouterr().err) == warned
        if command == "scan":  # an answer that is over at once has no token to flag
            assert result["flagged"] == warned * result["inputs"]
