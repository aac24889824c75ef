"""The page of the headline: claims, tables and figures from what was found for each part and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from lmcore.claims import Claim, rows
from lmcore.record import write_atomically
from lmcore.report import Page, svg
from siftmasks.deletions import deletion_steps

Found = Mapping[str, Sequence[Mapping[str, Any]]]
TITLES = {
    "permuted": "digits, permuted labels",
    "private": "text, private label words",
    "rotated": "digits, rotated",
    "shared": "text, shared label words",
    "many": "digits, permuted labels, 500 tasks",
}
# Okabe and Ito's colours: apart for every kind of colour vision.
_LINES: dict[str, tuple[str, str, str]] = {
    "sift_masks": ("SIFT-Masks (1/T, the paper's)", "#0072B2", "o"),
    "sift_masks_count": ("SIFT-Masks (1/C)", "#56B4E9", "s"),
    "sign_ledger": ("own signs + ledger", "#009E73", "D"),
    "ft_merge": ("FT + Merge", "#D55E00", "v"),
    "sift_merge": ("SIFT + Merge", "#E69F00", "^"),
    "emr": ("EMR", "#CC79A7", "P"),
    "bitdelta": ("BitDelta", "#000000", "X"),
    "central": ("central fine-tuning", "#777777", "*"),
}
_NAMES = {
    "zero_shot": "base model",
    "local_fine_tuning": "own model, fine-tuned",
    "local_sift": "own model, sign-fixed",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "breadcrumbs": "breadcrumbs",
    "consensus": "Consensus",
    "tall_masks": "TALL-masks",
    "mask_only": "masks and one scale per tensor, no merged vector",
    "sift_masks_density": "SIFT-Masks (one scale, by density)",
    **{key: name for key, (name, _, _) in _LINES.items()},
}
_FREE, _ONE, _ALL = "nothing", "the task itself", "all other tasks"
_TO_FORGET = {
    "local_fine_tuning": _FREE, "local_sift": _FREE, "bitdelta": _FREE, "mask_only": _FREE, "sift_masks": _ONE, "sift_masks_count": _ONE,
    "sift_masks_density": _ONE, "sign_ledger": _ONE, "ft_merge": _ONE, "sift_merge": _ONE, "task_arithmetic": _ONE, "ties": _ALL,
    "dare": _ONE, "breadcrumbs": _ONE, "consensus": _ALL, "tall_masks": _ALL, "emr": _ALL, "central": _ALL,
}  # fmt: skip


def write_page(path: Path, claims: Sequence[Claim], found: Found) -> None:
    """Write index.html, and beside it merging.svg, the picture of the README."""
    shown = {part: runs for part, runs in found.items() if part in TITLES}
    page = Page(
        "SIFT-Masks at small scale",
        "Many tasks of one model are fine-tuned, merged, served and deleted; every method gets the same tasks. Means over seeds.",
    )
    page.section("Claims")
    page.table(rows({"claims": [asdict(claim) for claim in claims]}), "Effects are positive where the paper's claim holds.")
    page.section("Merging")
    page.figure(merging_figure(shown), "Score by number of tasks merged, mean over seeds; the dashed line is the base model.")
    page.table(
        _methods(shown),
        "Score in percent with all tasks merged, mean over seeds, and what has to be trained again to forget one task exactly.",
    )
    page.section("Deletion")
    swept = {part: runs for part, runs in shown.items() if len(runs[0]["deletion"]["fractions"]) > 1}
    if swept:
        page.figure(
            deletion_figure(swept),
            "Score while tasks are deleted: full lines over the tasks that remain, dotted ones over all, the deleted ones without a mask.",
        )
    page.figure(
        cost_figure(), "Optimizer steps to serve deletions one by one, of 500 tasks of 20 steps each: counted, not timed."
    )
    page.table(
        _costs(shown),
        "Deleting one task: seconds, mean over seeds; the ledger trains one task again, the others all that remain.",
    )
    page.table(
        _residues(shown), "What one deletion leaves: in a float32 running sum, and in the integer ledger after the whole sweep."
    )
    page.write(path)
    write_atomically(path.with_name("merging.svg"), svg(merging_figure(shown)))


def merging_figure(found: Found) -> Figure:
    """One panel per setting: score against the number of tasks merged. It is the README's picture, too."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(found) :]:
        axes.remove()
    for axes, (part, runs) in zip(panels, found.items(), strict=False):
        counts = runs[0]["counts"]
        for method, (name, colour, marker) in _LINES.items():
            axes.plot(counts, _mean(runs, method), color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        axes.axhline(fmean(_mean(runs, "zero_shot")), color="#999999", linestyle="--", linewidth=1)
        _by_tasks(axes, counts)
        axes.set_title(TITLES[part], fontsize=10)
    panels[0].set_ylabel("score (%)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def deletion_figure(found: Found) -> Figure:
    """One panel per setting: score against the share of tasks deleted."""
    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (part, runs) in zip(panels, found.items(), strict=True):
        shares = [100 * fraction for fraction in runs[0]["deletion"]["fractions"]]
        for method in runs[0]["deletion"]["held_in"]:
            name, colour, marker = _LINES[method]
            for side, style in (("held_in", "-"), ("held_out", ":")):
                curve = [100 * fmean(values) for values in zip(*(run["deletion"][side][method] for run in runs), strict=True)]
                label = name if side == "held_in" else None
                axes.plot(shares, curve, style, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        axes.set_title(TITLES[part], fontsize=10)
        axes.set_xlabel("tasks deleted (%)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score (%)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def cost_figure() -> Figure:
    """Fig. 9 of the paper: cumulated steps against the number of deletions."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    deletions = [1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 499]
    kinds = {
        "sift_masks": ("SIFT-Masks, FT + Merge", "#0072B2"),
        "shards": ("20 random clusters (SISA)", "#E69F00"),
        "central": ("central; TIES, TALL-masks, EMR", "#777777"),
    }
    for kind, (name, colour) in kinds.items():
        axes.plot(deletions, [deletion_steps(500, 20, deletions=n)[kind] for n in deletions], color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="deletions", ylabel="optimizer steps in all")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _by_tasks(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tasks merged")
    axes.set_ylim(0, 104)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(runs: Sequence[Mapping[str, Any]], method: str) -> list[float]:
    """Percent by number of tasks, mean over seeds."""
    return [100 * fmean(values) for values in zip(*(run["accuracy"][method] for run in runs), strict=True)]


def _methods(found: Found) -> list[dict[str, Any]]:
    methods = dict.fromkeys(method for runs in found.values() for method in runs[0]["accuracy"])
    return [
        {
            "method": _name(method),
            **{
                TITLES[part]: _mean(runs, method)[-1] if method in runs[0]["accuracy"] else None for part, runs in found.items()
            },
            "to forget one, train": _TO_FORGET.get(method, _cluster_or_top(method)),
        }
        for method in methods
    ]


def _name(method: str) -> str:
    if method.startswith("shards_"):
        return f"{method.removeprefix('shards_')} random clusters (SISA)"
    if method.startswith("sift_masks_count_top_"):
        return f"SIFT-Masks (1/C), largest {float(method.removeprefix('sift_masks_count_top_')):.0%} of each tensor"
    return _NAMES[method]


def _cluster_or_top(method: str) -> str:
    if method == "zero_shot":
        return "-"
    return "the rest of its cluster" if method.startswith("shards_") else _ONE


def _costs(found: Found) -> list[dict[str, Any]]:
    kinds = {
        "rederive": "SIFT-Masks, task trained again",
        "archive": "SIFT-Masks, levels from the archive",
        "rebuild": "EMR rebuilt from all other tasks",
        "central": "central fine-tuning",
        "shards_4": "one of 4 clusters",
        "shards_20": "one of 20 clusters",
    }
    table = []
    for kind, name in kinds.items():
        row: dict[str, Any] = {"method": name}
        for part, runs in found.items():
            times = [run["seconds_per_deletion"][kind] for run in runs if kind in run["seconds_per_deletion"]]
            row[TITLES[part]] = fmean(times) if times else None
        table.append(row)
    return table


def _residues(found: Found) -> list[dict[str, Any]]:
    return [
        {
            "setting": TITLES[part],
            "weights": runs[0]["weights"],
            "float32 sum: share of weights that differ (%)": 100 * fmean(run["float_sum"]["share_different"] for run in runs),
            "largest difference": max(run["float_sum"]["largest_difference"] for run in runs),
            "ledger: weights that differ": sum(run["deletion"]["differing"] for run in runs),
        }
        for part, runs in found.items()
    ]
