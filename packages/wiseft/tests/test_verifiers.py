"""Verifiers find the final answer, agree with GSM8K's own labels, and survive what they cannot parse."""

import json
import sys
from pathlib import Path

import pytest

from lmcore.errors import UserError
from wiseft.verifiers import VERIFIERS, boxed, exact, gsm8k, math

REAL_SOLUTIONS = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("16 - 7 = 9 and 9 * 2 = 18.\n#### 18", "18"),
        ("#### 18\n\nQuestion: What is 2 + 2?\n#### 4", "18"),
        ("#### $1,250.50", "1250.5"),
        ("#### eighteen, that is 18", "18"),
        ("He pays 3, 4 and then 1,000,000.", "1000000"),
        ("16-3", "3"),
        ("The change is -3", "-3"),
        ("x = (-3)", "-3"),
        ("a debt of -$0.50", "-0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        (f"1{'0' * 40}", f"1{'0' * 40}"),
        ("none", None),
        ("", None),
    ],
)
def test_gsm8k_takes_the_marked_number_else_the_last(completion, answer):
    assert gsm8k(completion, "1").answer == answer


@pytest.mark.skipif(not REAL_SOLUTIONS.exists(), reason="needs the GSM8K model solutions beside the repository")
def test_gsm8k_agrees_with_the_labels_of_5276_real_solutions():
    rows = [json.loads(line) for line in REAL_SOLUTIONS.read_text().splitlines()]
    judged = [
        gsm8k(solution["solution"], row["ground_truth"]).correct == solution["is_correct"]
        for row in rows
        for solution in row.values()
        if isinstance(solution, dict)
    ]
    assert len(judged) == 5276
    assert all(judged)


@pytest.mark.parametrize(
    ("completion", "reference", "correct"),
    [
        (r"so \boxed{4}, no: \boxed{ 5 }.", "5", True),
        (r"\boxed{\dfrac{1}{2}}", r"We get $\boxed{\frac12}$ or \boxed{\frac{1}{2}}", True),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"\boxed{18}", "9 * 2 = 18\n#### 18", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", False),
        ("the answer is 5", "5", False),
        (r"\boxed{5", "5", False),
    ],
)
def test_boxed_compares_the_last_balanced_box(completion, reference, correct):
    assert boxed(completion, reference).correct is correct


def test_boxed_answer_is_none_without_a_complete_box():
    assert boxed(r"\boxed{\frac{1}{2}", "1").answer is None


def test_exact_ignores_only_white_space_around_the_text():
    assert exact("\n085;119 ", "085;119").correct
    assert not exact("85;119", "085;119").correct


def test_math_compares_values():
    pytest.importorskip("math_verify")
    for completion, reference, correct in (
        (r"So $x = \boxed{1/2}$", r"\frac{1}{2}", True),
        ("it is 0.5", r"$\frac{2}{4}$", True),
        (r"\boxed{18}", "9 * 2 = 18 #### 18", True),
        (r"\boxed{2x + 2}", "2(x+1)", True),
        (r"\boxed{3}", "4", False),
        ("no idea", "4", False),
    ):
        assert math(completion, reference).correct is correct, completion
    assert math(r"\boxed{0.50}", "1").answer == math(r"\boxed{0.5}", "1").answer


def test_math_gives_up_where_the_comparison_runs_out_of_time(monkeypatch):
    math_verify = pytest.importorskip("math_verify")
    from math_verify.errors import TimeoutException

    def too_slow(*args, **options):
        raise TimeoutException

    monkeypatch.setattr(math_verify, "verify", too_slow)
    verdict = math(r"\boxed{4}", "4")
    assert verdict.gave_up
    assert not verdict.correct


def test_math_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'wiseft\[math\]'"):
        math("4", "5")


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(UserError, match="'Monday' has no number"):
        gsm8k("4", "Monday")


@pytest.mark.parametrize("name", set(VERIFIERS) - {"math"})
def test_every_verifier_judges_an_empty_completion_incorrect(name):
    assert not VERIFIERS[name]("", "5").correct
