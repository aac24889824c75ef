"""The page of `weightwatch evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.report import Page
from weightwatch.evaluation import CLEAN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE = "#0072B2", "#D55E00"


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page, self-contained, from what `evaluate` returns, with `attacks` and `harm` where they were run."""
    sets = ", ".join(f"{count} {name}" for name, count in result["sets"].items())
    page = Page(f"Evaluation of {result.get('model', 'a monitor')}", f"{result['directions']} directions; inputs: {sets}")
    page.section("Flagged inputs")
    page.text(
        "Share of each set that a rule flags, with Clopper-Pearson intervals of 95 %. Only on the triggered set should it be large."
    )
    page.table(rule_rows(result))
    page.section("Detectors")
    page.text(
        "Against the clean inputs, over inputs on which nothing was chosen or fit: the area under the ROC curve, and the share found at "
        "thresholds that 1 % and 2 % of other clean inputs exceed, with the false alarms that they cause here."
    )
    page.table(detector_rows(result))
    if result["best_direction"]:
        best = result["best_direction"]
        page.text(
            f"The best direction was chosen among {4 * result['directions']} ends on {best['chosen_on'][0]} clean and "
            f"{best['chosen_on'][1]} triggered inputs that are not in the table; on these its area is {best['auroc_chosen_on']:.3f}."
        )
    page.section("False alarms against the size of the calibration")
    page.figure(
        curve(result),
        "Min/max rule without epsilon on held-out clean inputs; the range over subsets is shaded, the bound is 2t/(n + 1).",
    )
    if "attacks" in result:
        page.section("What steering does")
        page.text(
            f"An attack succeeds if the completion {result['success']}. What is watched: {' and '.join(result['watched'])} tokens."
        )
        page.table(attack_rows(result))
    if "harm" in result:
        page.section("What a false alarm does")
        page.text("Clean inputs, each steered as if its own score were just above the threshold.")
        page.table(harm_rows(result))
    page.write(path)


def rule_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per rule."""
    rows = []
    for one in result["rules"]:
        row = {"rule": f"{one['rule']} {one['level']:g}", "bound of false alarms": _percent(one["fpr_bound"])}
        rows.append(
            {
                **row,
                **{name: _share(one["sets"][name]) if name in one["sets"] else "too few calibrated" for name in result["sets"]},
            }
        )
    return rows


def detector_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per detector and set."""
    rows = []
    for one in result["detectors"]:
        row = {
            "detector": one["detector"],
            "set": one["set"],
            "inputs": one["inputs"],
            "AUROC": _interval(one["auroc"], "{:.3f}"),
        }
        for at in one["at"]:
            row[f"found at {at['fpr']:.0%}"] = f"{_share(at['tpr'])}; false alarms {_percent(at['fpr_seen']['value'])}"
        rows.append(row)
    return rows


def attack_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per set."""
    names = {"flagged": "flagged", "before": "succeeds", "after": "succeeds, steered", "changed": "changed by steering"}
    return [
        {"set": one["set"], "inputs": one["inputs"], **{shown: _share(one[name]) for name, shown in names.items()}}
        for one in result["attacks"]
    ]


def harm_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    one = result["harm"]
    return [
        {
            "inputs": one["inputs"], "completions unchanged": _share(one["unchanged"]), "loss (nats per token)": one["loss_before"],
            "loss, steered": one["loss_after"], "increase": _interval(one["increase"], "{:.4f}"),
            "largest increase": one["largest_increase"],
        }
    ]  # fmt: skip


def curve(result: Mapping[str, Any]) -> "Figure":
    """Rate of false alarms by calibrated inputs, both logarithmic."""
    from matplotlib.figure import Figure

    rows = result["fpr_curve"]
    sizes = [row["inputs"] for row in rows]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    least = 0.5 / max(1, result["sets"][CLEAN])  # where a rate of 0 is drawn
    low, high = zip(*(row["range"] for row in rows), strict=True)
    axes.fill_between(
        sizes, [max(one, least) for one in low], [max(one, least) for one in high], color=_BLUE, alpha=0.2, linewidth=0
    )
    axes.plot(sizes, [max(row["fpr"], least) for row in rows], "o-", color=_BLUE, markersize=4, label="measured")
    axes.plot(sizes, [row["bound"] for row in rows], "--", color=_ORANGE, label="bound")
    axes.set(xlabel="calibrated inputs", ylabel="false alarms", xscale="log", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _share(estimate: Mapping[str, Any]) -> str:
    low, high, _ = estimate["interval"]
    return f"{estimate['value']:.1%} [{low:.1%}, {high:.1%}]"


def _interval(estimate: Mapping[str, Any], form: str) -> str:
    shown = form.format(estimate["value"])
    return (
        f"{shown} [{form.format(estimate['interval'][0])}, {form.format(estimate['interval'][1])}]"
        if estimate["interval"]
        else shown
    )
