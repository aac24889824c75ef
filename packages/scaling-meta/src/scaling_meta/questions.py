"""The questions that the paper answers with SHAP curves, and what this table says to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scaling_meta.effects import Contrast, Effects, Range

Verdict = Literal["as expected", "direction only", "opposite", "not identified"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether the score is higher (`expected` 1) or lower (-1) where `feature` is in the range `above` than where it is in `below`."""

    name: str
    text: str
    feature: str
    below: Range
    above: Range
    expected: Mapping[str, Literal[1, -1]]
    """Of each benchmark that the question is about."""


@dataclass(frozen=True)
class Answer:
    """The difference in mean effect and what follows.

    as expected: the interval lies on the expected side of 0. direction only: the difference does. opposite: it does not.
    not identified: one of the two sides has models of fewer than two families, so that the feature cannot be told from the family.
    """

    contrast: Contrast
    verdict: Verdict


_ACCURACIES = (
    "arc_challenge", "hellaswag", "mmlu_0shot", "mmlu_5shot", "truthfulqa", "winogrande", "lambada", "gsm8k", "humaneval",
)  # fmt: skip

QUESTIONS = (
    Question(
        name="code_much",
        text="Beyond 15 to 25 % of code, do language tasks fall and code tasks rise?",
        feature="share_code",
        below=(15.0, 25.0),
        above=(25.0, 100.0),
        expected={"lambada": -1, "hellaswag": -1, "humaneval": 1},
    ),
    Question(
        name="code_some",
        text="Up to 15 to 25 % of code, do code tasks rise?",
        feature="share_code",
        below=(0.0, 15.0),
        above=(15.0, 25.0),
        expected={"humaneval": 1},
    ),
    Question(
        name="web",
        text="Are models with more data from the web less truthful?",
        feature="share_web",
        below=(0.0, 50.0),
        above=(50.0, 100.0),
        expected={"truthfulqa": -1},
    ),
    Question(
        name="rotary",
        text="Are rotary positions better than learned ones? (Said in the paper's first version, no longer in its third.)",
        feature="positional_embeddings",
        below="learned",
        above="rope",
        expected=dict.fromkeys(_ACCURACIES, 1),
    ),
)
"""Code share: the trade-off at 15 to 25 %; web share against TruthfulQA; rotary against learned positions."""


def answer(task: str, effects: Effects, question: Question, level: float = 0.95) -> Answer:
    """What the effects of the question's feature on the scores of a task say to it."""
    expected = question.expected[task]
    found = effects.contrast(question.below, question.above, level)
    if min(len(found.below.families), len(found.above.families)) < 2:
        return Answer(found, "not identified")
    if min(expected * end for end in found.difference.interval[:2]) > 0:
        return Answer(found, "as expected")
    return Answer(found, "direction only" if expected * found.difference.value > 0 else "opposite")
