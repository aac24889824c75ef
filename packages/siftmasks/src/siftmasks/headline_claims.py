"""The claims of the headline, judged over seeds from what was measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcore.claims import Claim, Quantity, judge, not_tested
from siftmasks.deletions import deletion_steps

Found = dict[str, Any]
"""What `comparison.compare` returned for one seed of one part."""
Effect = Callable[[Found], float]
_SETTINGS = {
    "permuted": "Digits with permuted labels",
    "private": "Users with private label words",
    "rotated": "Rotated digits",
    "shared": "Users with shared label words",
    "many": "500 tasks of digits with permuted labels",
}


@dataclass(frozen=True)
class Question:
    """A claim about one part of the headline; `effect` is positive where it holds, from what was found for one seed."""

    id: str
    part: str
    says: str
    effect: Effect
    unit: str = "points"
    at_least: float = 0.0
    published: Quantity | None = None


def claims(found: Mapping[str, Sequence[Found]]) -> list[Claim]:
    """Judge what was measured, by part and seed; claims whose part was left out are not tested."""
    return [_judged(question, found.get(question.part, [])) for question in _questions()] + [_fewer_steps(), _exact(found)]


def _questions() -> Iterator[Question]:
    """The claims that are judged over seeds. Scores are at the largest number of tasks of the part."""
    published = Quantity(5, "points or more (5 to 80)")
    for part in _SETTINGS:
        gain = _gain("sift_masks", "ft_merge")
        yield Question(
            f"masks-{part}", part, "SIFT-Masks beats naive merging (FT + Merge)", gain, at_least=5, published=published
        )
    for part in ("permuted", "private", "shared"):
        yield from _questions_about(part)


def _questions_about(part: str) -> Iterator[Question]:
    def ask(id: str, says: str, effect: Effect, unit: str = "points", published: Quantity | None = None) -> Question:
        return Question(f"{id}-{part}", part, says, effect, unit, published=published)

    yield ask(
        "sign-constraint", "the sign constraint costs less than 2 points of a task's own model",
        lambda one: 2 - _gain("local_fine_tuning", "local_sift")(one), "points below 2", Quantity(1, "point lost"),
    )  # fmt: skip
    yield ask(
        "signs-alone", "equal signs without masks (SIFT + Merge) gain less than 2 points over FT + Merge",
        lambda one: 2 - _gain("sift_merge", "ft_merge")(one), "points below 2",
    )  # fmt: skip
    yield ask(
        "other-masks", "SIFT-Masks beats the best of TIES, TALL-masks and EMR",
        lambda one: min(_gain("sift_masks", rival)(one) for rival in ("ties", "tall_masks", "emr")),
    )  # fmt: skip
    yield ask("central", "SIFT-Masks beats central fine-tuning at equal epochs", _gain("sift_masks", "central"))
    yield ask(
        "bitdelta", "SIFT-Masks beats BitDelta, which the paper does not run: as many bits per task, and forgetting is free",
        _gain("sift_masks", "bitdelta"),
    )  # fmt: skip
    yield ask(
        "held-in", "forgetting half of the tasks costs the others less than 1 point",
        lambda one: 1 + 100 * (_after(one, "held_in", 0.5) - _after(one, "held_in", 0.0)), "points, plus 1",
    )  # fmt: skip
    yield ask(
        "time", "forgetting a task takes less time than central fine-tuning on the others",
        lambda one: one["seconds_per_deletion"]["central"] / one["seconds_per_deletion"]["rederive"] - 1, "times less, minus 1",
    )  # fmt: skip


def _judged(question: Question, runs: Sequence[Found]) -> Claim:
    statement = f"{_SETTINGS[question.part]}: {question.says}"
    if not runs:
        why = f"this scale leaves the part {question.part} out: see the scale long"
        return not_tested(id=question.id, statement=statement, why=why, published=question.published)
    return judge(
        id=question.id, statement=statement, effects=[question.effect(one) for one in runs], unit=question.unit,
        seeds=[one["seed"] for one in runs], at_least=question.at_least, published=question.published,
    )  # fmt: skip


def _gain(better: str, worse: str) -> Effect:
    """Points by which the first method is above the second."""
    return lambda one: 100 * (one["accuracy"][better][-1] - one["accuracy"][worse][-1])


def _after(one: Found, side: str, fraction: float) -> float:
    return float(one["deletion"][side]["sift_masks"][one["deletion"]["fractions"].index(fraction)])


def _fewer_steps() -> Claim:
    steps = deletion_steps(500, 20, deletions=499)
    ratio = steps["central"] / steps["sift_masks"]
    return Claim(
        id="fewer-steps",
        statement="Forgetting 499 of 500 tasks one by one takes 250 times fewer optimizer steps than central fine-tuning each time",
        published=Quantity(250, "times fewer steps"),
        measured=Quantity(ratio, "times fewer steps"),
        verdict="reproduced" if ratio >= 250 else "not reproduced",
        rule="counted, at 20 steps a task and equal epochs, not timed; reproduced if at least 250",
    )


def _exact(found: Mapping[str, Sequence[Found]]) -> Claim:
    statement = (
        "What forgot tasks is, byte for byte, what never learned them, in any order: stores, exports, ledgers after the sweeps"
    )
    ledgers = [one for part in _SETTINGS for one in found.get(part, [])]
    stores = found.get("store", [])
    if not stores:
        return not_tested(id="exact", statement=statement, why="this scale leaves the part store out")
    different = sum(one["different_files"] for one in stores) + sum(one["deletion"]["differing"] for one in ledgers)
    return Claim(
        id="exact",
        statement=statement,
        measured=Quantity(different, "files or ledger coordinates that differ"),
        seeds=tuple(one["seed"] for one in stores),
        verdict="reproduced" if different == 0 else "not reproduced",
        rule="reproduced if no file of a store or an export and no coordinate of a ledger differs",
    )
