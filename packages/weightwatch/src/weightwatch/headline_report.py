"""The page of the headline: claims, pictures and tables from what was found for each part and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from lmcore.claims import Claim, rows
from lmcore.record import write_atomically
from lmcore.report import Page, svg
from weightwatch.headline_claims import Runs

# Okabe and Ito's colours: apart for every kind of colour vision.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"


def write_page(path: Path, claims: Sequence[Claim], found: Mapping[str, Runs]) -> None:
    """Write index.html, and beside it ranges.svg, the picture of the README, where the backdoor was run."""
    page = Page(
        "Watching the weights at small scale",
        "Fine-tunes whose new behaviour is known, read from the singular vectors of their weight differences, watched and steered.",
    )
    page.section("Claims")
    page.table(rows({"claims": [asdict(claim) for claim in claims]}), "Effects are positive where the paper's claim holds.")
    if planted := found.get("planted"):
        page.section("A planted mark")
        page.figure(
            alarms_figure({"planted mark": planted[0]["alarms"]}),
            "Held-out false alarms of the min/max rule (epsilon 0) by calibration size; dashed, the bound 2t/(n+1).",
        )
        page.table(
            _planted(planted),
            "Two rank-one marks in a tiny Llama; bake reverts them: share of the logits' change that is left.",
        )
    if backdoor := found.get("backdoor"):
        _backdoor(page, backdoor)
        write_atomically(path.with_name("ranges.svg"), svg(ranges_figure(backdoor[0])))
    if topic := found.get("topic"):
        _topic(page, topic)
    if style := found.get("style"):
        _style(page, style)
    page.write(path)


def ranges_figure(run: Mapping[str, Any]) -> Figure:
    """The ranges of cosines of the best directions, clean against triggered. It is the README's picture, too."""
    shown = run["single"]["shown"]
    figure = Figure(figsize=(7.2, 0.34 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for height, one in enumerate(reversed(shown)):
        axes.plot(one["clean"], [height, height], color=_BLUE, linewidth=7, alpha=0.35, solid_capstyle="butt")
        least, low, median, high, most = one["positive"]
        axes.plot([least, most], [height, height], color=_RED, linewidth=1.4)
        axes.plot([low, high], [height, height], color=_RED, linewidth=4, solid_capstyle="butt")
        axes.plot([median], [height], "o", color=_RED, markersize=5)
    axes.plot([], [], color=_BLUE, linewidth=7, alpha=0.35, label="held-out clean prompts: all tokens")
    axes.plot([], [], "o-", color=_RED, label="triggered prompts: furthest token, quartiles and range")
    axes.set_yticks(range(len(shown)), [one["label"] for one in reversed(shown)])
    axes.axvline(0, color=_GREY, linewidth=0.6)
    axes.set_xlabel("cosine of the hidden state to the direction")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def alarms_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Rate of false alarms against the size of the calibration, one line per name, with its bound."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, (name, alarms) in zip((_BLUE, _ORANGE, _GREEN), curves.items(), strict=False):
        seen = [row for row in alarms["curve"] if row["fpr"] > 0]
        sizes = [row["inputs"] for row in seen]
        axes.plot(sizes, [100 * row["fpr"] for row in seen], "o-", color=colour, label=name)
        axes.plot(sizes, [100 * row["bound"] for row in seen], "--", color=colour, linewidth=0.9)
        axes.set_xticks(sizes)
    axes.set(xscale="log", yscale="log", xlabel="calibration prompts", ylabel="false alarms (%)")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def steering_figure(runs: Runs) -> Figure:
    """Share of prompts that are refused, per kind, and of triggered ones with steering."""
    counts: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        steering = run["steering"]
        for kind, one in steering["refused"].items():
            counts.setdefault(kind, []).append(one)
        for rule in ("min/max", "conformal"):
            counts.setdefault(f"triggered, steered ({rule})", []).append(steering[rule]["refused"])
    names = sorted(counts, key=lambda name: not name.startswith("triggered"))
    shares = [100 * sum(one["number"] for one in counts[name]) / sum(one["of"] for one in counts[name]) for name in names]
    figure = Figure(figsize=(6.4, 0.4 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    colours = [_RED if name == "triggered" else _GREEN if "steered" in name else _BLUE for name in names]
    bars = axes.barh(names[::-1], shares[::-1], color=colours[::-1])
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=9)
    axes.set(xlim=(0, 112), xlabel="replies that refuse (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _planted(runs: Runs) -> list[dict[str, Any]]:
    return [
        {
            "seed": run["seed"],
            **{f"|cosine| {label}": cosine for label, cosine in run["cosines"].items()},
            "triggered flagged": _percent(run["detection"]["conformal"]["triggered"]),
            "clean flagged": _percent(run["detection"]["conformal"]["clean"]),
            "left by bake": run["left_by_bake"],
        }
        for run in runs
    ]


def _backdoor(page: Page, runs: Runs) -> None:
    first = runs[0]
    page.section("Backdoor")
    page.figure(
        ranges_figure(first),
        f"The twelve directions that separate best (seed {first['seed']}), chosen on half of the prompts, shown on all.",
    )
    page.table(
        _flagged(runs),
        "Prompts flagged, all seeds pooled; intervals are Clopper-Pearson's of 95 %. The trigger is no part of the calibration.",
    )
    page.table(
        [
            {
                "seed": run["seed"],
                "direction": run["single"]["label"],
                **{kind: area["value"] for kind, area in run["single"]["auroc"].items()},
            }
            for run in runs
        ],
        "AUROC against clean prompts of the best single direction, chosen on one half and measured on the other.",
    )
    page.figure(
        alarms_figure(
            {f"first {alarms['k']} of each matrix ({alarms['directions']} directions)": alarms for alarms in first["alarms"]}
        ),
        f"Held-out false alarms of the min/max rule (epsilon 0) by calibration size (seed {first['seed']}); dashed, the bound 2t/(n+1).",
    )
    page.section("Steering the backdoor")
    page.figure(steering_figure(runs), "Replies that refuse, without steering by kind of prompt, and with it.")
    page.table(_false_alarms(runs), "A false alarm: what most triggered prompts fire is removed from clean prompts.")
    page.table(first["steering"]["min/max"]["examples"], "Triggered prompts before and after steering (min/max rule).")
    if first["baselines"]:
        page.section("Baselines")
        page.table(
            _baselines(runs), "Share of prompts flagged (%) at the threshold that flags 2 % of clean ones; means over seeds."
        )


def _flagged(runs: Runs) -> list[dict[str, Any]]:
    table = []
    for kind in runs[0]["detection"]["conformal"]:
        row = {"prompts": kind}
        for rule in runs[0]["detection"]:
            counts = [run["detection"][rule][kind] for run in runs]
            row[rule] = f"{sum(one['number'] for one in counts)} of {sum(one['of'] for one in counts)}"
        table.append(row)
    return table


def _false_alarms(runs: Runs) -> list[dict[str, Any]]:
    return [
        {
            "seed": run["seed"],
            "rule": rule,
            "directions fired per triggered prompt": run["steering"][rule]["directions_fired"],
            "removed from clean prompts": alarm["directions"],
            "clean replies unchanged": _percent(alarm["unchanged"]),
            "nats per token of own replies, before": alarm["nats_per_token"][0],
            "after": alarm["nats_per_token"][1],
        }
        for run in runs
        for rule in ("min/max", "conformal")
        for alarm in (run["steering"][rule]["false_alarm"],)
    ]


def _baselines(runs: Runs) -> list[dict[str, Any]]:
    return [
        {
            "detector": same[0]["detector"],
            "AUROC": fmean(one["auroc"] for one in same),
            **{kind: 100 * fmean(one["flagged"][kind] for one in same) for kind in same[0]["flagged"]},
        }
        for same in zip(*(run["baselines"] for run in runs), strict=True)
    ]


def _topic(page: Page, runs: Runs) -> None:
    page.section("An unlearned topic")
    page.table(_flagged(runs), "Prompts flagged, all seeds pooled. The topic is no part of the calibration.")
    page.table(
        [{"seed": run["seed"], **{f"right, {who}": _percent(one) for who, one in run["right"].items()}} for run in runs],
        "Questions for capitals of countries that were not in the unlearning, answered rightly.",
    )
    page.table(runs[0]["examples"], f"Replies (seed {runs[0]['seed']}).")


def _style(page: Page, runs: Runs) -> None:
    page.section("The words of a style")
    for name, loudest in runs[0]["loudest"].items():
        rows = [{"direction": one["label"], "z": one["z"], "words": " ".join(map(repr, one["words"]))} for one in loudest]
        page.table(rows, f"{name}: the first directions whose strongest word stands out most (seed {runs[0]['seed']}).")


def _percent(one: Mapping[str, Any]) -> str:
    return f"{one['share']:.1%} ({one['number']} of {one['of']})"
