"""What the parts of the headline measure alike: extremes of prompts, rates by rule, and the best single direction."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import linear_regression
from typing import Any

import numpy as np
from jaxtyping import Float32
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightwatch.bounds import Bounds
from weightwatch.calibration import Calibration
from weightwatch.conversations import USER, Conversation, TokenizedConversation, tokenize
from weightwatch.directions import Bank
from weightwatch.scanning import scan
from weightwatch.statistics import auroc, clopper_pearson, fpr_curve

_Some = Float32[np.ndarray, "_ roles directions"]  # not as many of every kind
Range = tuple[_Some, _Some]
"""The least and the greatest cosines of inputs."""
EPSILON = 0.01
"""Of the paper's min/max rule."""
_MAX_LENGTH = 256
_SHOWN = 12
"""Directions that the picture shows."""


def of_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: Bank, prompts: Sequence[str]) -> Range:
    """The extremes of prompts."""
    return of_conversations(model, bank, conversations(prompts, tokenizer))


def conversations(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedConversation]:
    """Prompts in the chat template, up to the header of the reply."""
    chats = [Conversation(str(i), ({"role": "user", "content": prompt},)) for i, prompt in enumerate(prompts)]
    return [*tokenize(chats, tokenizer, max_length=_MAX_LENGTH)]


def of_conversations(model: PreTrainedModel, bank: Bank, conversations: Sequence[TokenizedConversation]) -> Range:
    """The extremes of what is already tokens."""
    parts = [(peaks.low, peaks.high) for _, peaks in scan(model, bank, conversations)]
    low, high = (np.concatenate(side) for side in zip(*parts, strict=True))
    return low, high


def calibrated(digest: str, of: Range) -> Calibration:
    """A calibration on these inputs."""
    low, high = of
    calibration = Calibration(digest, low.shape[2])
    calibration.add([str(i) for i in range(len(low))], low, high)
    return calibration


def rules(calibration: Calibration, alpha: float) -> dict[str, Bounds]:
    """The bounds by rule: split-conformal at `alpha`, and the paper's."""
    return {"conformal": calibration.conformal(alpha), "min/max": calibration.minmax(EPSILON)}


def detection(calibration: Calibration, alpha: float, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """By rule, how many inputs of each kind it flags."""
    return {
        rule: {kind: share(bounds.flags(*extremes)) for kind, extremes in ranges.items()}
        for rule, bounds in rules(calibration, alpha).items()
    }


def share(hits: Iterable[Any]) -> dict[str, Any]:
    """How many of these are true: number, out of, share and its 95 % interval."""
    of = [bool(hit) for hit in hits]
    estimate = clopper_pearson(sum(of), len(of))
    return {"number": sum(of), "of": len(of), "share": estimate.value, "interval": [*estimate.interval]}


def single_directions(labels: Sequence[str], ranges: Mapping[str, Range], *, clean: str, positive: str) -> dict[str, Any]:
    """Each direction and side alone as a detector: the best one, chosen on the first half of `clean` and `positive` inputs.

    Best is the largest AUROC, and of equal ones the largest distance of the means in standard deviations of clean inputs. AUROCs of that
    one, on the other halves, by kind of input against `clean`; and for the picture the `shown` best: the range of all clean inputs, and
    the quartiles of the extreme of `positive` ones on that side.
    """
    outward = {kind: np.stack([-low[:, USER], high[:, USER]], -1) for kind, (low, high) in ranges.items()}
    half = {kind: len(values) // 2 for kind, values in outward.items()}
    below, above = outward[clean][: half[clean]], outward[positive][: half[positive]]
    chosen = _auroc_each(below, above)
    distance = (above.mean(0) - below.mean(0)) / below.std(0)
    order = np.lexsort((-distance.reshape(-1), -chosen.reshape(-1)))
    best, side = (int(i) for i in np.unravel_index(order[0], chosen.shape))
    against = outward[clean][half[clean] :, best, side].astype(float)
    areas = {
        kind: auroc(against, values[half[kind] if kind == positive else 0 :, best, side].astype(float))
        for kind, values in outward.items()
        if kind != clean
    }
    return {
        "label": labels[best],
        "side": ("low", "high")[side],
        "auroc": {kind: {"value": area.value, "interval": [*area.interval]} for kind, area in areas.items()},
        "perfect": int((chosen.max(1) >= 1).sum()),
        "directions": len(labels),
        "shown": [_shown(labels, ranges[clean], ranges[positive], *np.unravel_index(i, chosen.shape)) for i in order[:_SHOWN]],
    }


def alarms_by_size(
    labels: Sequence[str], calibrate: Range, held_out: Range, sizes: Sequence[int], *, k: int, seed: int
) -> dict[str, Any]:
    """The rate of false alarms of the min/max rule (epsilon 0) by calibration size, for the first `k` directions of each writer.

    `slope` is that of the log rate in the log size, over rates from 0 to 0.5: -1 is "as 1/n". None where there are fewer than two.
    """
    first = [int(label.partition("_u")[2]) < k for label in labels]
    low, high, held_out_low, held_out_high = (side[:, :, first] for side in (*calibrate, *held_out))
    curve = fpr_curve(low, high, held_out_low, held_out_high, sizes, seed=seed)
    known = [row for row in curve if 0 < row["fpr"] < 0.5]
    sizes_and_rates = (np.log([row[name] for row in known]) for name in ("inputs", "fpr"))
    slope = linear_regression(*sizes_and_rates).slope if len(known) > 1 else None
    return {"k": k, "directions": sum(first), "curve": curve, "slope": slope}


def _auroc_each(clean: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC per direction and side, [directions, 2], from [inputs, directions, 2]."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([clean, positive]), axis=0)[len(clean) :].sum(0)
    m, n = len(clean), len(positive)
    return (ranks - n * (n + 1) / 2) / (m * n)


def _shown(labels: Sequence[str], clean: Range, positive: Range, direction: Any, side: Any) -> dict[str, Any]:
    extreme = positive[side][:, USER, direction]
    return {
        "label": labels[direction],
        "clean": [float(clean[0][:, USER, direction].min()), float(clean[1][:, USER, direction].max())],
        "positive": [float(value) for value in np.quantile(extreme, [0, 0.25, 0.5, 0.75, 1])],
    }
