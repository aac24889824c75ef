"""The page of the headline: claims, tables and figures from what `headline_seed.measure` found for each seed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lmcore.claims import Claim, rows
from lmcore.report import Page
from wiseft.headline_seed import KS, Record, Settings

# Okabe and Ito's colours: apart for every kind of colour vision.
_WISE, _LAST, _STOPPED, _TEMPERATURE, _BASE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_NAMES = {
    "base": "base model",
    "early": "early checkpoint",
    "early_stopping": "early stopping",
    "last": "last checkpoint",
    "wise": "WiSE-FT",
}


def write_page(path: Path, claims: Sequence[Claim], worlds: Sequence[Record], settings: Settings, k: int) -> None:
    """Write index.html; `k` is that of the claims."""
    world = settings.world
    page = Page(
        "WiSE-FT in the arithmetic world",
        f"A tiny Llama learns {world.addends}-number additions by fine-tuning on {world.chains} chains for {world.epochs} epochs. "
        f"WiSE-FT is {settings.delta:g} x the checkpoint of epoch {settings.early} + {1 - settings.delta:g} x the last. Pass@k is "
        f"exact on {world.test_problems} test problems; {len(worlds)} seeds.",
    )
    page.section("Claims")
    page.table(rows({"claims": [asdict(claim) for claim in claims]}), "Effects are positive where the paper's claim holds.")
    page.section("Pass@k")
    page.table(
        _models(worlds),
        "Mean over seeds, in percent. Early stopping is the single epoch with the best Pass@64 on the test problems.",
    )
    page.figure(pass_at_k_figure(worlds), _PASS_AT_K)
    page.figure(
        training_figure(worlds, k),
        f"Along fine-tuning: each checkpoint, and the same checkpoint interpolated with epoch {settings.early}. Mean over seeds.",
    )
    page.figure(
        histogram_figure(worlds),
        "How often a problem is solved: histogram of ρ over the problems of all seeds. Diversity collapse is the mass at the left.",
    )
    page.section("Decoding")
    page.table(_decoding(worlds, k), f"Pass@{k} under the same decoding for both, mean over seeds, in percent.")
    page.figure(plane_figure(worlds), _PLANE)
    page.section("Choosing one answer")
    page.table(
        _votes(worlds, settings),
        f"Accuracy of the final answer in percent, mean over seeds, from {settings.samples} samples. Best@{settings.voters} takes the "
        "sample that is likeliest under the base model.",
    )
    if settings.rl_steps:
        page.section("Reinforcement learning")
        page.figure(
            rl_figure(worlds),
            "Pass@1 on the test problems while the exact policy gradient trains on new problems; one panel per seed.",
        )
    page.write(path)


_PASS_AT_K = (
    "Left: Pass@k, mean over seeds. Right: the same minus Pass@k of the last checkpoint; thin lines are WiSE-FT's seeds. The best epoch "
    "and the best temperature are chosen on the test problems for each k, which flatters them."
)
_PLANE = (
    "Bias and variance of Pass@1, one panel per seed: the path of SFT, the last checkpoint at temperatures 0.5 to 2, and "
    "WiSE-FT. Lower and further left is better."
)


def pass_at_k_figure(worlds: Sequence[Record]) -> Figure:
    """Pass@k of WiSE-FT and its baselines, and their gain over the last checkpoint."""
    curves: dict[str, tuple[Callable[[Record], np.ndarray], dict[str, Any]]] = {
        "base model": (lambda w: _curve(w["models"]["base"]), {"color": _BASE, "linestyle": ":"}),
        "best single epoch": (lambda w: np.max([_curve(e) for e in w["epochs"]], 0), {"color": _STOPPED, "linestyle": "--"}),
        "last, best temperature": (
            lambda w: np.max([_curve(t) for t in w["temperatures"]], 0),
            {"color": _TEMPERATURE, "linestyle": "-."},
        ),
        "last checkpoint": (lambda w: _curve(w["models"]["last"]), {"color": _LAST}),
        "WiSE-FT": (lambda w: _curve(w["models"]["wise"]), {"color": _WISE, "linewidth": 2.4}),
    }
    figure, (left, right) = _panels(2, "samples k")
    for name, (curve, style) in curves.items():
        values = np.array([curve(world) for world in worlds])
        left.plot(KS, values.mean(0), label=name, **style)
        if name != "base model":
            gains = values - [_curve(world["models"]["last"]) for world in worlds]
            right.plot(KS, gains.mean(0), **style)
            if name == "WiSE-FT" and len(worlds) > 1:
                right.plot(KS, gains.T, color=_WISE, linewidth=0.7, alpha=0.5)
    left.set_ylabel("Pass@k, %")
    right.set_ylabel("points above the last checkpoint")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(KS[::2]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    return _with_legend(figure, left)


def training_figure(worlds: Sequence[Record], k: int) -> Figure:
    """Pass@1 and Pass@k along fine-tuning, with and without WiSE-FT."""
    figure, panels = _panels(2, "epoch of fine-tuning")
    for axes, order in zip(panels, (1, k), strict=True):
        for kind, colour, name in (("epochs", _LAST, "SFT checkpoint"), ("wise_epochs", _WISE, "WiSE-FT of it")):
            values = np.array([[_curve(record)[KS.index(order)] for record in world[kind]] for world in worlds])
            axes.plot([record["epoch"] for record in worlds[0][kind]], values.mean(0), color=colour, label=name)
        axes.set_ylabel(f"Pass@{order}, %")
    return _with_legend(figure, panels[0])


def histogram_figure(worlds: Sequence[Record]) -> Figure:
    """Histogram of log10 ρ of the last checkpoint, the best single epoch and WiSE-FT."""
    figure, (axes,) = _panels(1, "success probability ρ of a problem", "share of problems, %")
    edges = np.linspace(-10, 0, 41)
    for name, colour in (("early_stopping", _STOPPED), ("last", _LAST), ("wise", _WISE)):
        success = np.concatenate([world["success"][name] for world in worlds])
        logarithm = np.log10(np.maximum(success, 1e-300)).clip(edges[0], 0)
        share = 100 * np.histogram(logarithm, edges)[0] / len(success)
        axes.stairs(share, edges, color=colour, linewidth=1.8, label=_NAMES[name])
    axes.xaxis.set_major_locator(FixedLocator(range(-10, 1, 2)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"≤ 1e{x:g}" if x == -10 else "1" if x == 0 else f"1e{x:g}"))
    return _with_legend(figure, axes)


def plane_figure(worlds: Sequence[Record]) -> Figure:
    """Bias against variance of Pass@1: SFT over epochs, the last checkpoint over temperatures, and WiSE-FT."""
    figure, panels = _panels(len(worlds), "bias  1 − E[ρ]", "variance of ρ over problems")
    for axes, world in zip(panels, worlds, strict=True):
        for kind, style, name in (
            ("epochs", {"color": _STOPPED, "marker": "."}, "SFT, epoch by epoch"),
            ("temperatures", {"color": _TEMPERATURE, "marker": "s", "markersize": 4}, "last checkpoint, temperatures"),
        ):
            axes.plot(*_plane(world[kind]), linewidth=1, **style, label=name)
        axes.plot(*_plane([world["models"]["last"]]), "o", color=_LAST, markersize=8, label="last checkpoint")
        axes.plot(*_plane([world["models"]["wise"]]), "*", color=_WISE, markersize=13, label="WiSE-FT")
        axes.set_title(f"seed {world['seed']}", fontsize=10)
        axes.locator_params(axis="x", nbins=4)
    return _with_legend(figure, panels[0])


def rl_figure(worlds: Sequence[Record]) -> Figure:
    """Pass@1 against the problems that reinforcement learning has seen, by starting point."""
    figure, panels = _panels(len(worlds), "problems seen, thousands", "Pass@1, %")
    for axes, world in zip(panels, worlds, strict=True):
        for start, colour in (("early_stopping", _STOPPED), ("last", _LAST), ("wise", _WISE)):
            curve = world["rl"][start]
            axes.plot(
                [record["problems"] / 1000 for record in curve],
                [_curve(record)[0] for record in curve],
                color=colour,
                label=f"from {_NAMES[start]}",
            )
        axes.set_title(f"seed {world['seed']}", fontsize=10)
    return _with_legend(figure, panels[0])


def _models(worlds: Sequence[Record]) -> list[Record]:
    table = []
    for name in _NAMES:
        records = [world["models"][name] for world in worlds]
        table.append(_row(_NAMES[name], records))
    for place, record in enumerate(worlds[0]["temperatures"]):
        if record["temperature"] != 1:
            table.append(
                _row(
                    f"last checkpoint, temperature {record['temperature']:g}",
                    [world["temperatures"][place] for world in worlds],
                )
            )
    return table


def _row(name: str, records: Sequence[Record]) -> Record:
    passed = {
        f"Pass@{k}": _percent(_curve(record)[i] for record in records) for i, k in enumerate(KS) if k in (1, 4, 16, 64, 256)
    }
    means = {key: float(np.mean([record[key] for record in records])) for key in ("bias", "variance")}
    return {"model": name, **passed, **means}


def _decoding(worlds: Sequence[Record], k: int) -> list[Record]:
    at = KS.index(k)
    table = []
    for place, row in enumerate(worlds[0]["decoding"]):
        values = {name: [_curve(world["decoding"][place][name])[at] for world in worlds] for name in ("last", "wise")}
        gains = np.subtract(values["wise"], values["last"])
        table.append(
            {
                "decoding": row["setting"],
                "last checkpoint": _percent(values["last"]),
                "WiSE-FT": _percent(values["wise"]),
                "gain": _percent(gains),
                "least gain of a seed": _percent([gains.min()]),
            }
        )
    return table


def _votes(worlds: Sequence[Record], settings: Settings) -> list[Record]:
    k = settings.voters
    return [
        {
            "model": _NAMES[name],
            "one sample": _percent(100 * world["votes"][name]["pass_at_1"] for world in worlds),
            f"majority vote@{k}": _percent(100 * world["votes"][name]["majority"] for world in worlds),
            f"Best@{k}": _percent(100 * world["votes"][name]["best"] for world in worlds),
            f"Best@{k}, perfect reward": _percent(100 * world["votes"][name]["oracle"] for world in worlds),
        }
        for name in ("early_stopping", "last", "wise")
    ]


def _curve(record: Record) -> np.ndarray:
    return 100 * np.asarray(record["pass_at_k"])


def _percent(values: Iterable[float]) -> float:
    return round(float(np.mean([*values])), 1)


def _plane(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [record["bias"] for record in records], [record["variance"] for record in records]


def _panels(count: int, x: str, y: str = "") -> tuple[Figure, list[Axes]]:
    """At most three panels in a row."""
    columns = min(count, 3)
    height = -(-count // columns)
    figure = Figure(figsize=(max(6.4, 3.2 * columns), 3.0 * height + 0.8), layout="constrained")
    panels = [figure.add_subplot(height, columns, number + 1) for number in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    return figure, panels


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    """Above the panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
    return figure
