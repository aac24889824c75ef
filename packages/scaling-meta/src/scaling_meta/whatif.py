"""What if: the predicted score of a design with some of it changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmcore.errors import UserError
from scaling_meta.conformal import Calibrated, Intervals
from scaling_meta.files import EXCLUSIVE
from scaling_meta.schema import FIELDS
from scaling_meta.support import Neighbour, Support
from scaling_meta.table import Table

_ROUNDED = 100.5  # shares as reported are rounded


@dataclass(frozen=True, eq=False)
class Answer:
    """Predictions before and after a change, and of the change itself: what the two have in common cancels there.

    nearest: the models most like the changed design
    """

    before: Intervals
    after: Intervals
    change: Intervals
    nearest: tuple[Neighbour, ...]


def what_if(
    calibrated: Calibrated, before: Table, after: Table, asked: Sequence[str], *, level: float = 0.9,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Answer:  # fmt: skip
    """Predict a design before and after a change, both tables of one row; `asked` are the features that the change is about.

    Raises: `OutsideSupport` if there are too few models like either (see `Support.problems`).
    """
    support = Support.of(calibrated.table)
    before, after = before.select(calibrated.table.features), after.select(calibrated.table.features)
    support.check(before)
    support.check(after, asked)
    one, other = (calibrated.predict(design, level).within(*bounds) for design in (before, after))
    width = bounds[1] - bounds[0]
    change = calibrated.change(before, after, level).within(-width, width)
    return Answer(one, other, change, tuple(support.nearest(after)))


def changed(design: Table, values: Mapping[str, str], taking_from: Sequence[str] = ()) -> Table:
    """The design (a table of one row) with other values of some fields, as text.

    What an exclusive share (web, code, books, reference, academic) grows by is taken from the shares named in `taking_from`, in proportion
    to what they have; what it shrinks by goes to them. Raises: `UserError` for an unknown field, a value out of range, a share to take
    from that is not known or too small, or shares that would sum to over 100 %.
    """
    row, table = dict(zip(design.features, design.values[0].tolist(), strict=True)), design
    for name, text in values.items():
        feature = feature_of(name)
        if name not in FIELDS or feature not in row:
            known = [*(field for field in FIELDS if field in row), "params", "tokens_billions"]
            raise UserError(f"--set {name}: it is no feature of this table: they are {', '.join(known)}")
        try:
            value = FIELDS[name].parse(text)
        except ValueError as error:
            raise UserError(f"--set {name}: {error}") from None
        if isinstance(value, str):
            row[feature] = float(FIELDS[name].categories.index(value))
        else:
            row[feature] = value if feature == name else math.log(value) + (math.log(1e9) if name == "tokens_billions" else 0.0)
    _rebalance(row, dict(zip(design.features, design.values[0].tolist(), strict=True)), taking_from, design.models[0])
    return replace(table, values=np.array([[row[name] for name in design.features]], np.float64))


def feature_of(field: str) -> str:
    """The feature that a field enters as."""
    return {"params": "log_params", "tokens_billions": "log_tokens"}.get(field, field)


def _rebalance(row: dict[str, float], old: Mapping[str, float], taking_from: Sequence[str], model: str) -> None:
    """Let the shares in `taking_from` give what the others take, and check the sum."""
    set_now = [name for name in EXCLUSIVE if name in row and row[name] != old[name] and not math.isnan(row[name])]
    for name in taking_from:
        if name not in EXCLUSIVE or name not in row or name in set_now:
            raise UserError(f"--from {name}: choose shares other than those set, of {', '.join(EXCLUSIVE)}")
        if math.isnan(row[name]):
            raise UserError(f"--from {name}: it is not known of {model}: choose another share")
    if taking_from:
        unknown = [name for name in set_now if math.isnan(old[name])]
        if unknown:
            raise UserError(f"{unknown[0]} of {model} is not known, so that --from cannot give the difference: leave it out")
        grown, whole = sum(row[name] - old[name] for name in set_now), sum(row[name] for name in taking_from)
        if grown > whole + 1e-9:
            raise UserError(
                f"{' and '.join(taking_from)} of {model} have {whole:g} %, not the {grown:g} % to take: name more shares"
            )
        for name in taking_from:
            row[name] = max(0.0, row[name] - grown * (row[name] / whole if whole else 1 / len(taking_from)))
    total = sum(row[name] for name in EXCLUSIVE if name in row and not math.isnan(row[name]))
    before = sum(old[name] for name in EXCLUSIVE if name in row and not math.isnan(old[name]))
    if set_now and total > max(_ROUNDED, before + 1e-9):
        raise UserError(f"the shares of {model} would sum to {total:g} %: say which shrink, as in --from share_web")
