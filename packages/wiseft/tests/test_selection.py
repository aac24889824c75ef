"""`wiseft select` finds the best candidate in a world where every probability is known, and survives being killed."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from wiseft import cli
from wiseft.barrier import DELTAS
from wiseft.decoding import Decoding
from wiseft.passk import pass_at_k
from wiseft.problems import Problem, read_problems
from wiseft.sampling import sample
from wiseft.selection import select
from wiseft.verifiers import exact

torch.set_num_threads(1)

LETTERS, DIGITS, WIDTH = "abcdefghijkl", "0123456789", 16
TOKENIZER = character_tokenizer(LETTERS + DIGITS)
RIGHT = [TOKENIZER.convert_tokens_to_ids(DIGITS[i % 10]) for i in range(len(LETTERS))]
WRONG = [TOKENIZER.convert_tokens_to_ids(DIGITS[(i + 1) % 10]) for i in range(len(LETTERS))]
CHOICES = {"delta": (0.3, 0.7), "temperature": (0.7, 1.3)}


def log_odds(right: list[float], wrong: list[float]) -> torch.Tensor:
    """Logits [letter, token] that answer a letter rightly, and in the one wrong way, with these probabilities."""
    probability = torch.full((len(LETTERS), len(TOKENIZER)), 1e-9)
    for i, (p, q) in enumerate(zip(right, wrong, strict=True)):
        probability[i, TOKENIZER.convert_tokens_to_ids(list(DIGITS))] = (1 - p - q) / 8
        probability[i, RIGHT[i]], probability[i, WRONG[i]] = p, q
    return probability.log()


# SFT has made LATE certain: right on one half of the letters, wrong on the other. EARLY is unsure of all.
LATE = log_odds([0.9] * 6 + [0.003] * 6, [0.02] * 6 + [0.95] * 6)
EARLY = log_odds([0.5] * 12, [0.1] * 12)
SURE = log_odds([0.9] * 12, [0.02] * 12)


def save(folder: Path, logits: torch.Tensor, unit: list[int]) -> Path:
    """A Llama whose only working parts are embedding and head: letter i is hidden unit `unit[i]`."""
    model = tiny_llama(vocab_size=len(TOKENIZER), hidden_size=WIDTH, layers=1, heads=1, tie=False)
    weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    weights |= {name: torch.ones_like(weight) for name, weight in weights.items() if "norm" in name}
    weights["model.embed_tokens.weight"][TOKENIZER.convert_tokens_to_ids(list(LETTERS)), unit] = 1
    weights["lm_head.weight"][:, unit] = logits.T / WIDTH**0.5  # the last norm makes sqrt(WIDTH) of a 1
    model.load_state_dict(weights)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    ordered, turned = list(range(12)), [*range(1, 12), 0]
    save(folder / "late", LATE, ordered)
    save(folder / "early", EARLY, ordered)
    save(folder / "sure", SURE, ordered)
    save(folder / "turned", SURE, turned)
    lines = [{"problem": f"p{i}", "prompt": LETTERS[i % 12], "answer": DIGITS[i % 12 % 10]} for i in range(72)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def selected(world: Path, out: Path, late: str = "late", early: str = "early", **changed) -> dict:
    options = {"k": 4, "n": 6, "verifier": exact, "max_new_tokens": 1, **CHOICES, **changed}
    problems = options.pop("problems", None) or read_problems(world / "problems.jsonl")
    return select(world / late, [world / early], problems, out=out, **options)


@pytest.fixture(scope="module")
def whole(world) -> Path:
    selected(world, world / "whole")
    return world / "whole"


def exact_pass_at_4(delta: float, temperature: float) -> float:
    probability = ((delta * EARLY + (1 - delta) * LATE) / temperature).softmax(-1)
    return float(1 - ((1 - probability[range(12), RIGHT]) ** 4).mean())


def test_the_candidate_with_the_best_exact_pass_at_k_is_chosen(whole):
    result = json.loads((whole / "result.json").read_text())
    weights = [0.0, *CHOICES["delta"]]
    truth = {(d, t): exact_pass_at_4(d, t) for d in weights for t in CHOICES["temperature"]}
    rows = {(row["delta"], row["temperature"]): row for row in result["candidates"]}
    assert rows.keys() == truth.keys()
    best = max(truth, key=truth.__getitem__)
    assert rows[best]["status"] in ("chosen", "not told apart")
    chosen = next(key for key, row in rows.items() if row["status"] == "chosen")
    assert truth[chosen] > truth[best] - 0.1
    assert result["chosen"] == rows[chosen]["name"] == result["candidates"][0]["name"]
    for key, row in rows.items():
        assert row["interval"][0] <= truth[key] <= row["interval"][1]
    assert all(rows[0.0, t]["status"].startswith("eliminated") for t in CHOICES["temperature"])


def test_samples_are_saved_and_counted(whole):
    result = json.loads((whole / "result.json").read_text())
    spent = result["sampling"]
    assert spent["problems"] == 54
    assert spent["samples_without_race"] == 6 * 6 * 54
    assert spent["samples"] == 6 * sum(row["problems"] for row in result["candidates"]) < 0.8 * spent["samples_without_race"]
    assert spent["tokens"] == spent["samples"], "a completion has one token, which is no end token"
    assert {row["cut_off"] for row in result["candidates"]} == {1.0}
    assert spent["tokens_saved"] == spent["samples_without_race"] - spent["samples"]


def test_the_winner_and_late_are_measured_on_problems_held_out(whole):
    held_out = json.loads((whole / "result.json").read_text())["held_out"]
    lines = [json.loads(line) for line in (whole / "counts.jsonl").read_text().splitlines()]
    raced = {line["problem"] for line in lines[: -2 * 18]}
    counts = [[line for line in lines[-2 * 18 :] if line["candidate"] == held_out[role]["name"]] for role in ("chosen", "late")]
    assert held_out["problems"] == 18 == len(counts[0]) == len(counts[1])
    assert not raced & {line["problem"] for line in counts[0]}
    values = [pass_at_k(6, [line["correct"] for line in each], 4).mean() for each in counts]
    assert held_out["chosen"]["pass_at_k"]["value"] == pytest.approx(values[0])
    assert held_out["difference"]["pass_at_k"]["value"] == pytest.approx(values[0] - values[1])
    assert held_out["difference"]["pass_at_k"]["interval"][0] > 0


def test_the_samples_are_those_of_wiseft_sample(world, whole, tmp_path):
    from lmcore.models import load_causal_lm

    problems = read_problems(world / "problems.jsonl")
    settings = {"n": 6, "verifier": exact, "max_new_tokens": 1, "decoding": Decoding(temperature=1.3)}
    sample(*load_causal_lm(world / "late"), problems, out=tmp_path, **settings)
    correct = dict.fromkeys((problem.id for problem in problems), 0)
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        correct[json.loads(line)["problem"]] += json.loads(line)["correct"]
    counts = [json.loads(line) for line in (whole / "counts.jsonl").read_text().splitlines()]
    drawn = {line["problem"]: line["correct"] for line in counts if line["candidate"] == "LATE alone, T 1.3"}
    assert len(drawn) >= 8
    assert drawn == {problem: correct[problem] for problem in drawn}


def test_the_barrier_is_that_of_the_exact_losses(world, tmp_path):
    # `turned` is `sure` with its hidden units in another order: the same function, but what lies between is another.
    each_five_times = read_problems(world / "problems.jsonl", limit=60)
    with pytest.warns(UserWarning, match=r"turned: at delta 0\.5 the loss is \d\.\d\d nats per token above"):
        result = selected(
            world, tmp_path, "sure", "turned", delta=(0.5,), temperature=(1.0,), holdout=0.0, problems=each_five_times
        )
    (barrier,) = result["barriers"]
    sure, turned = torch.eye(WIDTH)[:12], torch.eye(WIDTH)[[*range(1, 12), 0]]
    losses = []
    for delta in DELTAS:
        hidden = delta * turned + (1 - delta) * sure
        head = (delta * turned + (1 - delta) * sure).T @ SURE  # [unit, token]
        logits = hidden / hidden.norm(dim=1, keepdim=True) @ head
        losses.append(float(-logits.log_softmax(-1)[range(12), RIGHT].mean()))
    assert barrier["losses"] == pytest.approx(losses, abs=1e-3)
    assert barrier["delta"] == 0.5
    assert barrier["height"] == pytest.approx(losses[2] - (losses[0] + losses[4]) / 2, abs=1e-3)
    assert result["held_out"] is None


def test_between_equal_checkpoints_there_is_no_barrier_and_no_difference(world, tmp_path):
    result = selected(world, tmp_path, early="late", delta=(0.5,), temperature=(1.0,), tolerance=0.2, k=1, n=2)
    assert result["barriers"][0]["height"] == 0
    assert result["decision"] == "within tolerance"
    assert result["candidates"][0]["problems"] < 54
    assert result["candidates"][0]["pass_at_k"] == result["candidates"][1]["pass_at_k"]


def test_a_killed_run_ends_with_the_same_result(world, whole, forks, capsys):
    out = world / "killed"
    command = ["select", world / "late", "--early", world / "early", "--problems", world / "problems.jsonl", "--k", "4"]
    command += [
        "--n",
        "6",
        "--verifier",
        "exact",
        "--max-new-tokens",
        "1",
        "--delta",
        "0.3",
        "0.7",
        "--temperature",
        "0.7",
        "1.3",
    ]
    command += ["--device", "cpu", "--out", out]
    counts = out / "counts.jsonl"
    for lines in (3, 60, 150):
        forks.kill_when(lambda lines=lines: counts.exists() and counts.read_bytes().count(b"\n") >= lines, *command)
    assert not (out / "result.json").exists()
    with open(counts, "ab") as file:
        file.write(b'{"candidate": "early, del')  # what a kill in the middle of a line would leave
    with pytest.raises(SystemExit) as status:
        cli.main([str(part) for part in command])
    assert status.value.code == 0
    for name in ("counts.jsonl", "result.json", "barriers.json", "index.html"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    shown = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["chosen"] in shown.splitlines()[0]
    assert all(row["name"] in shown for row in result["candidates"])


def test_another_run_and_a_damaged_file_are_refused(world, whole, tmp_path):
    with pytest.raises(UserError, match=r"holds another run .*k: 4 before, 3 now"):
        selected(world, whole, k=3)
    quick = {"delta": (0.5,), "temperature": (1.0,), "holdout": 0.0, "block": 72, "k": 1, "n": 1}
    selected(world, tmp_path, **quick)
    counts = tmp_path / "counts.jsonl"
    counts.write_text(counts.read_text().replace("}\n", "\n", 1))
    with pytest.raises(UserError, match=r"counts\.jsonl, line 1 is not what this run wrote"):
        selected(world, tmp_path, **quick)
    selected(world, tmp_path, early="sure", **quick, overwrite=True)
    assert json.loads((tmp_path / "barriers.json").read_text()).keys() == {"sure"}, "those of the first run are gone"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": 0}, "k is 0: it must be at least 1"),
        ({"n": 3}, "n is 3: it must be at least k = 4"),
        ({"block": 60}, "of 72 problems 54 are left to race on, fewer than a block of 60"),
        ({"problems": [Problem("a", "a", "0")]}, "fewer than a block of 8"),
        ({"early": "nowhere"}, "nowhere"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"level": 0.0}, "level is 0.0"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"temperature": ()}, "make 0 candidates"),
        ({"temperature": (-1.0,)}, "temperature is -1.0"),
        ({"delta": (float("nan"),)}, "not a finite number"),
        ({"max_new_tokens": 300}, "exceed the 256 positions"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_sample_is_drawn(world, tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        selected(world, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit_are_refused(world, tmp_path):
    for name, options in {
        "wide": {"hidden_size": 32},
        "deep": {"layers": 2},
        "more": {"vocab_size": len(TOKENIZER) + 1},
    }.items():
        shape = {"vocab_size": len(TOKENIZER), "hidden_size": WIDTH, "layers": 1, "heads": 1, "tie": False} | options
        tiny_llama(**shape).save_pretrained(tmp_path / name)
    problems = read_problems(world / "problems.jsonl")
    for early, words in (
        ([tmp_path / "wide"], "different architectures"),
        ([tmp_path / "deep"], r"only .*deep has a tensor model\.layers\.1\..*: .* must be of one shape"),
        ([tmp_path / "more"], r"only .* has a tensor lm_head\.weight of shape .*: .* must be of one shape"),
        ([], "no early checkpoint"),
        ([world / "early", f"{world}/./early/"], "given twice"),
    ):
        with pytest.raises(UserError, match=words):
            select(world / "late", early, problems, k=4, out=tmp_path / "out", verifier=exact)
