"""Figures: Pass@k curves, the bias-variance plane, the histogram of Pass@1 and the difference of two models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from wiseft.comparison import Comparison
from wiseft.intervals import Estimate
from wiseft.summary import Summary

# Okabe and Ito's blue and vermilion: apart for every kind of colour vision, and in grey.
_COLOURS = ("#0072B2", "#D55E00")
_MARKERS = ("o", "s")


def pass_at_k_figure(models: Mapping[str, Summary], marked: Sequence[int]) -> Figure:
    """Pass@k of one or two models over k with their intervals and upper bounds; `marked` are the k that get a marker."""
    figure, axes = _axes("samples k", "Pass@k")
    for (name, summary), colour, marker in zip(models.items(), _COLOURS, _MARKERS, strict=False):
        rows = sorted(summary.pass_at_k, key=lambda row: row.k)
        k = [row.k for row in rows]
        low, high = zip(*map(_ends, rows), strict=True)
        axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
        at = [i for i, row in enumerate(rows) if row.k in marked]
        axes.plot(k, [row.value for row in rows], color=colour, marker=marker, markevery=at, markersize=5, label=name)
        bounded = [(row.k, row.upper_bound) for row in rows if row.upper_bound is not None]
        axes.plot(
            *zip(*bounded, strict=True),
            color=colour,
            linestyle=(0, (2, 2)),
            linewidth=1,
            label="upper bound" if len(models) == 1 else f"upper bound, {name}",
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
    _k_axis(axes, marked)
    return _with_legend(figure)


def bias_variance_figure(models: Mapping[str, Summary], k: int) -> Figure:
    """Bias and variance of Pass@1 with their intervals, over lines of equal upper bound on Pass@k.

    Models without a variance are left out.
    """
    figure, axes = _axes("bias  1 − E[Pass@1]", "variance of Pass@1 over problems")
    known = [(name, s.bias, s.variance) for name, s in models.items() if s.variance is not None]
    reach = [_ends(bias) + _ends(variance) for _, bias, variance in known]
    left, right = min(ends[0] for ends in reach), max(ends[1] for ends in reach)
    top = max(ends[3] for ends in reach)
    margin = max(0.02, 0.6 * (right - left), 0.3 * top)
    x = np.linspace(max(0.0, left - margin), min(1.0, right + margin), 201)
    y = np.linspace(min(0.0, *(ends[2] for ends in reach)), max(1.5 * top, 1e-4), 201)

    bound = 1 - (x**2 + np.maximum(y, 0)[:, None]) ** (k / 2)
    possible = np.where(y[:, None] <= x * (1 - x), bound, np.nan)
    lines = axes.contour(x, y, possible, levels=8, colors="#999999", linewidths=0.8)
    label: dict[str, Any] = {"fontsize": 8, "color": "#666666", "ha": "center", "va": "center"}
    taken = [variance.value for _, _, variance in known]
    for level, across, up in _label_places(np.array(lines.levels), x, y, possible, taken):
        axes.text(across, up, f"{100 * level:.4g}%", **label, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.fill_between(x, x * (1 - x), y[-1], where=x * (1 - x) < y[-1], color="#000000", alpha=0.06, linewidth=0)
    for (name, bias, variance), (low_x, high_x, low_y, high_y), colour, marker in zip(
        known, reach, _COLOURS, _MARKERS, strict=False
    ):
        axes.errorbar(
            bias.value,
            variance.value,
            xerr=[[bias.value - low_x], [high_x - bias.value]],
            yerr=[[variance.value - low_y], [high_y - variance.value]],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.2,
            capsize=2,
            label=name,
        )
    axes.plot([], [], color="#999999", linewidth=0.8, label=f"upper bound on Pass@{k}")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    return _with_legend(figure)


def histogram_figure(models: Mapping[str, Summary]) -> Figure:
    """The share of problems by their Pass@1; two models stand side by side in each bin."""
    figure, axes = _axes("Pass@1 of a problem", "share of problems")
    for i, ((name, summary), colour) in enumerate(zip(models.items(), _COLOURS, strict=False)):
        edges = np.array(summary.histogram.edges)
        width = 0.9 * np.diff(edges) / len(models)
        axes.bar(
            edges[:-1] + 0.05 * np.diff(edges) + i * width,
            np.array(summary.histogram.problems) / summary.problems,
            width=width,
            align="edge",
            color=colour,
            label=name,
        )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(0, 1)
    return _with_legend(figure)


def difference_figure(comparison: Comparison, names: tuple[str, str], marked: Sequence[int]) -> Figure:
    """Pass@k of the first model minus that of the second over k, with its paired interval."""
    figure, axes = _axes("samples k", "difference of Pass@k, points")
    rows = sorted(comparison.pass_at_k, key=lambda row: row.k)
    k = [row.k for row in rows]
    low, high = np.array([_ends(row) for row in rows]).T
    axes.axhline(0, color="#000000", linewidth=0.8)
    axes.fill_between(k, 100 * low, 100 * high, color=_COLOURS[0], alpha=0.2, linewidth=0)
    at = [i for i, row in enumerate(rows) if row.k in marked]
    axes.plot(
        k,
        [100 * row.value for row in rows],
        color=_COLOURS[0],
        marker="o",
        markevery=at,
        markersize=5,
        label=f"{names[0]} − {names[1]}",
    )
    _k_axis(axes, marked)
    return _with_legend(figure)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_places(
    levels: np.ndarray, x: np.ndarray, y: np.ndarray, bound: np.ndarray, taken: Sequence[float]
) -> list[tuple[float, float, float]]:
    """(level, x, y) where lines cross one row of the plane: the row with the most crossings of those away from the models."""
    best: list[tuple[float, float, float]] = []
    for height in (0.1, 0.3, 0.5, 0.7, 0.9):
        row = round(height * (len(y) - 1))
        inside = np.isfinite(bound[row]) & (abs(x - x.mean()) < 0.46 * np.ptp(x))
        if inside.any() and min(abs(y[row] - other) for other in taken) > 0.15 * np.ptp(y):
            across = np.interp(levels, bound[row][inside][::-1], x[inside][::-1], left=np.nan, right=np.nan)
            found = np.stack([levels, across, np.full_like(across, y[row])], axis=1)[np.isfinite(across)]
            best = max(best, list(map(tuple, found.tolist())), key=len)
    return best


def _with_legend(figure: Figure) -> Figure:
    """Above the axes, where it hides nothing."""
    entries = len(figure.axes[0].get_legend_handles_labels()[1])
    figure.legend(loc="outside upper center", ncols=entries if entries < 4 else 2, frameon=False)
    return figure


def _k_axis(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of the interval, with the value inside them; where there is none, the value twice."""
    low, high, _ = estimate.interval or (estimate.value, estimate.value, None)
    return min(low, estimate.value), max(high, estimate.value)
