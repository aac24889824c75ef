"""A paper's claim beside what was measured, with a verdict that is computed from the numbers."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

Verdict = Literal["reproduced", "direction only", "not reproduced", "not tested"]
Scale = Literal["smoke", "default", "long", "full"]


@dataclass(frozen=True)
class Quantity:
    """A number and its unit, e.g. `Quantity(4.2, "points of Pass@64")`."""

    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. `interval` is (low, high, level); `rule` says how the numbers became the verdict."""

    id: str
    statement: str
    published: Quantity | None = None
    measured: Quantity | None = None
    interval: tuple[float, float, float] | None = None
    seeds: tuple[int, ...] = ()
    verdict: Verdict
    rule: str


def judge(*, id: str, statement: str, effects: Sequence[float], unit: str, seeds: Sequence[int],
          at_least: float = 0.0, published: Quantity | None = None, level: float = 0.95) -> Claim:  # fmt: skip
    """Turn one effect per seed, signed so that positive is what the paper claims, into a verdict.

    `reproduced`: the Student t interval over seeds lies above 0 and the mean is at least `at_least`. `direction only`: the mean is above
    0. `not reproduced`: it is not. With one seed there is no interval and nothing better than `direction only`.
    """
    if len(effects) != len(seeds) or not effects or not all(map(math.isfinite, effects)):
        raise ValueError(f"claim {id}: {len(effects)} effects for {len(seeds)} seeds, all must be finite: {list(effects)}")
    mean = fmean(effects)
    interval = seed_interval(effects, level) if len(effects) > 1 else None
    clear = interval is not None and interval[0] > 0 and mean >= at_least
    verdict: Verdict = "reproduced" if clear else "direction only" if mean > 0 else "not reproduced"
    threshold = f" and the mean is at least {at_least:g}" if at_least else ""
    rule = f"reproduced if the {level:.0%} t interval over seeds is above 0{threshold}; direction only if the mean is above 0"
    return Claim(id=id, statement=statement, published=published, measured=Quantity(mean, unit),
                 interval=interval, seeds=tuple(seeds), verdict=verdict, rule=rule)  # fmt: skip


def not_tested(*, id: str, statement: str, why: str, published: Quantity | None = None) -> Claim:
    """A claim that this scale does not reach, and why."""
    return Claim(id=id, statement=statement, published=published, verdict="not tested", rule=why)


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Student t interval of the mean over seeds: mean ± t * s / sqrt(n), as (low, high, level).

    >>> [round(number, 3) for number in seed_interval([1.0, 2.0, 3.0])]  # t = 4.303 at 2 degrees of freedom
    [-0.484, 4.484, 0.95]
    """
    import numpy as np

    degrees, angle = len(values) - 1, np.linspace(0, np.pi / 2, 200_001)  # t = sqrt(degrees) tan(angle)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.cumsum(density) - (density + density[0]) / 2  # trapezoids up to each angle
    half = math.sqrt(degrees / len(values)) * math.tan(np.interp(level, mass / mass[-1], angle)) * stdev(values)
    return fmean(values) - half, fmean(values) + half, level


def to_json(package: str, claims: Sequence[Claim], *, scale: str) -> dict[str, Any]:
    """What `<package> headline --json` prints: package, scale, seeds and the claims."""
    seeds = sorted({seed for claim in claims for seed in claim.seeds})
    return {"package": package, "scale": scale, "seeds": seeds, "claims": [dataclasses.asdict(claim) for claim in claims]}


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The claims of `to_json` as a table for people: statement, measured with interval, verdict, seeds."""
    table = []
    for claim in result["claims"]:
        known, found, interval = claim["published"], claim["measured"], claim["interval"]
        published = f"{known['value']:g} {known['unit']}" if known else "-"
        measured = f"{found['value']:+.3g} {found['unit']}" if found else "-"
        measured += f" [{interval[0]:+.3g}, {interval[1]:+.3g}]" if interval else ""
        numbers = {"published": published, "measured": measured, "verdict": claim["verdict"]}
        table.append({"claim": claim["statement"], **numbers, "seeds": str(len(claim["seeds"]))})
    return table


def as_text(result: dict[str, Any]) -> str:
    """The claims as text for a terminal: a line with verdict and numbers, then the statement."""
    lines = [f"  {row['verdict']:<15} {row['measured']}\n  {'':<15} {row['claim']}" for row in rows(result)]
    return "\n".join([f"{result['package']} headline, scale {result['scale']}", *lines])
