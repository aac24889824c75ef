"""The page and the picture of the headline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lmcore.claims import Claim, rows
from lmcore.record import write_atomically
from lmcore.report import Page, svg

_BLUE, _RED, _GREY = "#0072b2", "#d55e00", "#666666"
_SPLITS = {"random": "random folds", "family": "unseen families", "compute": "most compute"}
_SHOWN = ("lambada", "hellaswag", "humaneval", "truthfulqa")


def write_page(out: Path, claims: Sequence[Claim], found: Mapping[str, Any]) -> None:
    """Write index.html, and the pictures gains.svg and effects.svg."""
    page = Page("Not just scale", "What the design of a language model says about its scores, as published and in fair tests.")
    page.section("Claims")
    page.table(rows({"claims": [asdict(claim) for claim in claims]}), "Positive is what the paper claims.")
    page.section("What architecture and data add to size and tokens")
    figures = {"gains.svg": gains_figure(found["gains"]), "effects.svg": effects_figure(found["answers"])}
    page.figure(
        figures["gains.svg"], "Relative reduction of the mean absolute error, with 95 % intervals over resampled families."
    )
    page.table(
        _gains(found["gains"]),
        "Errors with size and tokens alone, and with architecture and data; p of families exchanged whole.",
    )
    if "selected" in found:
        page.section("Selected features")
        page.table(_selected(found["selected"]), "Gain of forward selection: judged on the models it has seen, and on others.")
    page.section("Code and web in the data")
    page.figure(
        figures["effects.svg"],
        "Mean SHAP value of held-out models by share, with 95 % intervals; numbers of models (families) below.",
    )
    page.write(out / "index.html")
    for name, figure in figures.items():
        write_atomically(out / name, svg(figure))


def gains_figure(gains: Mapping[str, Any]) -> Figure:
    """The gain of architecture and data by benchmark and split. It is the README's picture, too."""
    figure = Figure(figsize=(7.6, 0.42 * len(gains) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(_SPLITS), sharey=True)
    names = [*gains][::-1]
    for axes, (split, title) in zip(panels, _SPLITS.items(), strict=True):
        for height, name in enumerate(names):
            one = gains[name][split]["gain"]
            low, high, _ = one["interval"]
            colour = _BLUE if low > 0 else _RED if high < 0 else _GREY
            axes.plot([100 * max(low, -1), 100 * high], [height, height], color=colour, linewidth=1.6)
            axes.plot([100 * max(one["value"], -1)], [height], "o", color=colour, markersize=5)
        axes.axvline(0, color="black", linewidth=0.7)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(-105, 100)  # what is worse than -100 % is drawn there
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    figure.supxlabel("reduction of the error (%)", fontsize=10)
    return figure


def effects_figure(answers: Mapping[str, Any]) -> Figure:
    """Effect curves of the code share on language and code tasks, and of the web share on TruthfulQA."""
    shown = [(name, "share_web" if name == "truthfulqa" else "share_code") for name in _SHOWN if name in answers]
    figure = Figure(figsize=(3.0 * len(shown), 3.2), layout="constrained")
    for axes, (name, feature) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        bins = [one for one in answers[name]["curves"][feature] if one["models"]]
        for place, one in enumerate(bins):
            low, high, _ = one["effect"]["interval"]
            colour = _BLUE if one["support"] == "fair" else _GREY
            axes.plot([place, place], [100 * low, 100 * high], color=colour, linewidth=1.6)
            axes.plot([place], [100 * one["effect"]["value"]], "o", color=colour, markersize=5)
        labels = [f"{one['name'].replace(' to ', '-')}\n{one['models']} ({len(one['families'])})" for one in bins]
        axes.set_xticks(range(len(bins)), labels, fontsize=7)
        axes.axhline(0, color="black", linewidth=0.7)
        axes.set_title(f"{name}, {feature.removeprefix('share_')} share", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("effect on the score (points)", fontsize=9)
    return figure


def _gains(gains: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = []
    for name, of in gains.items():
        row: dict[str, Any] = {"benchmark": name, "models": len(of["random"]["families"])}
        for split, title in _SPLITS.items():
            one = of[split]
            row |= {
                f"{title}: error": one["before"],
                f"{title}: gain": f"{one['gain']['value']:.1%}",
                f"{title}: p": one["family_p"],
            }
        row |= {"naive p": of["random"].get("naive_p"), "corrected p": of["random"].get("corrected_p")}
        table.append(row)
    return table


def _selected(selected: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": one["task"], "as published": f"{one['published']['gain'][0]:.1%}", "naive p": one["published"]["naive_p"],
            **{title: f"{one[split]['gain'][0]:.1%}" for split, title in _SPLITS.items()},
            "features, as published": ", ".join(one["published"]["features"][2:]),
        }
        for one in selected
    ]  # fmt: skip
