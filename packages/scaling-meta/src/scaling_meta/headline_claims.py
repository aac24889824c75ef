"""The claims of the headline, judged from what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmcore.claims import Claim, Quantity, Verdict, not_tested
from scaling_meta.inference import Estimate
from scaling_meta.questions import QUESTIONS, Question
from scaling_meta.schema import BENCHMARKS

Found = Mapping[str, Any]
_PUBLISHED = Quantity(3, "to 28 % less error")
_WHERE = {"random": "random folds", "family": "unseen families", "compute": "the fifth with the most compute"}
_VERDICTS: Mapping[str, Verdict] = {
    "as expected": "reproduced", "direction only": "direction only", "opposite": "not reproduced", "not identified": "not tested",
}  # fmt: skip


def claims(found: Found, seeds: Sequence[int]) -> list[Claim]:
    """Judge what was measured; claims whose part was left out are not tested."""
    return [
        *(_designed(found, name, seeds) for name in _WHERE),
        _as_published(found.get("selected", ())),
        *(_selected(found.get("selected", ()), name) for name in _WHERE),
        _scale_first(found["answers"], seeds),
        *(claim for question in QUESTIONS for claim in _answers(question, found["answers"], seeds)),
    ]


def joint_gain(tasks: Mapping[str, Found], resamples: int = 2000) -> Estimate:
    """The mean over tasks of the relative gain, with percentiles over resampled families, the same families in all tasks of a draw."""
    names = sorted({family for one in tasks.values() for family in one["families"]})
    weights = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    weights = np.concatenate([np.ones((1, len(names)), np.int64), weights])
    gains = []
    for one in tasks.values():
        of_model = weights[:, [names.index(family) for family in one["families"]]]
        before, after = (of_model @ np.array(errors) for errors in one["errors"])
        gains.append(
            1 - np.divide(after, before, out=np.ones_like(before), where=before > 0)
        )  # none of a draw without its models
    mean = np.mean(gains, 0)
    low, high = np.quantile(mean[1:], [0.025, 0.975])
    return Estimate(float(mean[0]), (float(low), float(high), 0.95))


def _designed(found: Found, name: str, seeds: Sequence[int]) -> Claim:
    gain = joint_gain({task: one[name] for task, one in found["gains"].items()})
    return Claim(
        id=f"design-{name}",
        statement=f"Architecture and data predict better than scale alone: {_WHERE[name]}, mean of {len(found['gains'])} benchmarks",
        published=_PUBLISHED, measured=Quantity(100 * gain.value, "% less error"), interval=_percent(gain), seeds=tuple(seeds),
        verdict=_judged(gain), rule="one setting of boosted trees, no selection; " + _RULE,
    )  # fmt: skip


_RULE = "reproduced if the 95 % interval over resampled families is above 0 and the mean at least 3 %; direction only if that is above 0"


def _judged(gain: Estimate) -> Verdict:
    if gain.interval[0] > 0 and gain.value >= 0.03:
        return "reproduced"
    return "direction only" if gain.value > 0 else "not reproduced"


def _as_published(selected: Sequence[Found]) -> Claim:
    statement = "Selected features predict better than scale alone, as published: chosen and judged on the same models"
    if not selected:
        return not_tested(id="selected-as-published", statement=statement, why=_LEFT_OUT, published=_PUBLISHED)
    gains = np.array([one["published"]["gain"][0] for one in selected])
    found = Quantity(100 * float(gains.mean()), f"% less error, {100 * gains.min():.1f} to {100 * gains.max():.1f}")
    verdict: Verdict = "reproduced" if (gains >= 0.03).all() else "direction only" if gains.mean() > 0 else "not reproduced"
    return Claim(
        id="selected-as-published", statement=statement, published=_PUBLISHED, measured=found, seeds=tuple(range(50)), verdict=verdict,
        rule="reproduced if all benchmarks gain at least 3 %; direction only if the mean is above 0; no interval can be honest here",
    )  # fmt: skip


def _selected(selected: Sequence[Found], name: str) -> Claim:
    statement = f"The same, features chosen anew in each training set: {_WHERE[name]}"
    if not selected:
        return not_tested(id=f"selected-{name}", statement=statement, why=_LEFT_OUT, published=_PUBLISHED)
    gains = [one[name]["gain"][:3] for one in selected]
    mean, above = float(np.mean([value for value, *_ in gains])), sum(low > 0 for _, low, _ in gains)
    verdict: Verdict = (
        "reproduced" if mean >= 0.03 and above > len(gains) / 2 else "direction only" if mean > 0 else "not reproduced"
    )
    return Claim(
        id=f"selected-{name}", statement=statement, published=_PUBLISHED, seeds=(0,), verdict=verdict,
        measured=Quantity(100 * mean, f"% less error; {above} of {len(gains)} benchmarks with an interval above 0"),
        rule="reproduced if the mean is at least 3 % and most intervals over families are above 0; direction only if the mean is",
    )  # fmt: skip


_LEFT_OUT = "this scale leaves selection out: see the scale long"


def _scale_first(answers: Found, seeds: Sequence[int]) -> Claim:
    first = 0
    for one in answers.values():
        weight = {name: found["value"] for name, found in one["importance"].items()}
        first += max(weight, key=weight.__getitem__) in ("log_params", "log_tokens")
    share = 100 * first / len(answers)
    return Claim(
        id="scale-first", statement="Size or tokens move predictions most (mean |SHAP| of held-out models)", seeds=tuple(seeds[:1]),
        measured=Quantity(share, f"% of {len(answers)} benchmarks"),
        verdict="reproduced" if share == 100 else "direction only" if share > 50 else "not reproduced",
        rule="reproduced if on all benchmarks, direction only if on most",
    )  # fmt: skip


def _answers(question: Question, answers: Found, seeds: Sequence[int]) -> list[Claim]:
    """A claim for each task that the question is about; one in all where no task can answer it."""
    found = {task: answers[task]["questions"][question.name] for task in question.expected if task in answers}
    known = {task: one for task, one in found.items() if one["verdict"] != "not identified"}
    if found and not known:
        sides = [one["contrast"][side] for one in found.values() for side in ("below", "above")]
        few = min(sides, key=lambda side: len(side["families"]))
        why = f"not identified: all models with {question.feature} {few['name']} are {', '.join(few['families']) or 'none'}"
        return [not_tested(id=question.name, statement=f"{question.text} ({why})", why=why)]
    return [_answered(question, task, one, seeds) for task, one in known.items()]


def _answered(question: Question, task: str, found: Found, seeds: Sequence[int]) -> Claim:
    difference = found["contrast"]["difference"]
    sign, unit = question.expected[task], "of Brier score" if BENCHMARKS[task].better == "lower" else "points of accuracy"
    low, high, level = difference["interval"]
    ends = sorted((100 * sign * low, 100 * sign * high))
    below, above = found["contrast"]["below"], found["contrast"]["above"]
    statement = f"{task}: {question.feature} {_name(above)} against {_name(below)} ({'better' if sign > 0 else 'worse'})"
    return Claim(
        id=f"{question.name}-{task}", statement=statement, measured=Quantity(100 * sign * difference["value"], unit),
        interval=(ends[0], ends[1], level), seeds=tuple(seeds[:1]), verdict=_VERDICTS[found["verdict"]],
        rule="difference of mean SHAP values of held-out models, positive if as the paper says; reproduced if the interval over resampled "
        "families is above 0, direction only if the difference is",
    )  # fmt: skip


def _name(side: Found) -> str:
    name = side["name"]
    return f"{name} %" if name[:1].isdigit() else str(name)


def _percent(gain: Estimate) -> tuple[float, float, float]:
    low, high, level = gain.interval
    return 100 * low, 100 * high, level
