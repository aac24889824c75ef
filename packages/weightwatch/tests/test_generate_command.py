import json

import pytest
import torch

from lmcore import cli
from lmcore.models import load_causal_lm

from .tiny_monitor import COMMANDS, calibrate, make, run, texts, write

PROMPTS = [*texts(5, 5), "abc#de", "gh ab"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("monitor"))
    calibrate(folder, folder / "state")
    write(folder / "prompts.jsonl", PROMPTS, ["left out"] * 3)
    return folder


def args(folder, *options):
    usual = [
        "--model",
        folder / "post",
        "--device",
        "cpu",
        "--max-new-tokens",
        12,
        "--batch-tokens",
        4 * (max(map(len, PROMPTS)) + 12),
    ]
    return ["generate", folder / "state", *usual, *options]


def answers(folder, name):
    """What a model writes by itself, one prompt at a time."""
    model, tokenizer = load_causal_lm(folder / name)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        yield tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_the_models_own_and_come_with_verdicts(folder):
    out = folder / "answers.jsonl"
    result = run(*args(folder, "--data", folder / "prompts.jsonl", "--out", out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"] for row in rows] == [*answers(folder, "post")]
    assert rows[5]["flagged"]
    assert rows[5]["events"][0]["label"] == "D1_u0"
    assert [row["steered"] for row in rows] == [[]] * 7
    assert result["inputs"] == 7
    assert result["completions"] == []


def test_steering_gives_the_flagged_answer_that_the_base_gives_and_leaves_the_others(folder):
    plain, base = [*answers(folder, "post")], [*answers(folder, "base")]
    result = run(*args(folder, "--data", folder / "prompts.jsonl", "--steer", "revert", "--base", folder / "base"))
    rows = result["completions"]
    assert rows[5]["steered"] == ["D1_u0"]
    for i, row in enumerate(rows):
        if not row["steered"]:
            assert row["completion"] == plain[i]
    assert rows[5]["completion"][:6] == base[5][:6]


def test_a_prompt_on_the_command_line_is_answered_for_people(folder, capsys):
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args(folder, "--prompt", "abc#de", "--steer", "remove"))]) == 0
    shown = capsys.readouterr().out
    assert "FLAGGED (p " in shown
    assert "D1_u0 at '#' of the user" in shown
    assert "steered D1_u0" in shown


def test_sampled_answers_are_those_of_the_seed_and_a_stopped_run_goes_on(folder, monkeypatch):
    from weightwatch import completing

    options = ["--data", folder / "prompts.jsonl", "--temperature", 1.0]
    whole = run(*args(folder, *options, "--out", folder / "whole.jsonl"))
    ordinary = completing.complete

    def stopping(*args, **options):
        if options["seed"] == 4:
            raise KeyboardInterrupt
        return ordinary(*args, **options)

    monkeypatch.setattr(completing, "complete", stopping)
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args(folder, *options, "--out", folder / "stopped.jsonl"))]) == 130
    monkeypatch.undo()
    assert run(*args(folder, *options, "--out", folder / "stopped.jsonl"))["flagged"] == whole["flagged"]
    assert (folder / "stopped.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert (
        run(*args(folder, *options, "--seed", 1))["completions"][0]["completion"]
        != json.loads((folder / "whole.jsonl").read_text().splitlines()[0])["completion"]
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "either --data or --prompt"),
        (["--prompt", "a", "--steer", "revert"], "--base belongs"),
        (["--prompt", "a", "--factor", 1], "--factor"),
        (["--prompt", "a" * 250], "exceeds the 256 positions"),
        (["--prompt", "a", "--max-new-tokens", 300], "exceeds the 256 positions"),
        (["--prompt", "a", "--events", 0], "at least 1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature at least 0 and finite"),
        (["--prompt", "a", "--steer", "scale", "--factor", "nan"], "must be finite"),
    ],
    ids=[
        "nothing to answer",
        "no base",
        "a factor without scale",
        "long prompt",
        "long answer",
        "no events",
        "no temperature",
        "no factor",
    ],
)
@pytest.mark.filterwarnings("ignore:1 of 1 conversations were cut")
def test_what_cannot_be_done_is_said(folder, capsys, options, complaint):
    assert cli.main("weightwatch", "", COMMANDS, [*map(str, args(folder, *options))]) == 2
    assert complaint in capsys.readouterr().err
