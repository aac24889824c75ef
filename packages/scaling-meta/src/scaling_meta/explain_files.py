"""What `scaling-meta explain --out` writes: the result, its tables, and a figure of each benchmark."""

from pathlib import Path
from typing import Any

from lmcore.record import published, write_atomically, write_json
from scaling_meta.files import csv_text

_PANELS = 6
_COLOURS = {"held_out": "C0", "in_sample": "C7", "local": "C1"}
LABELS = {"held_out": "SHAP, held out", "in_sample": "SHAP, in-sample", "local": "accumulated local effects"}


def write(result: dict[str, Any], out: Path, *, overwrite: bool = False) -> None:
    """Write explain.json, importance.csv, curves.csv, pairs.csv and `<benchmark>.png` into a new folder, all or nothing.

    `result` is what the command returns.
    """
    with published(out, overwrite=overwrite) as folder:
        write_json(folder / "explain.json", result)
        for name, rows in (("importance", _importance(result)), ("curves", _curves(result)), ("pairs", _pairs(result))):
            if rows:
                write_atomically(folder / f"{name}.csv", csv_text([*rows[0]], rows))
        for task, one in result["tasks"].items():
            figure(task, one).savefig(folder / f"{task}.png", dpi=120)


def figure(task: str, explained: dict[str, Any]) -> Any:
    """A matplotlib figure of the curves of the features that move a benchmark most, and of those that a question is about.

    A point is drawn larger the more models are in its range, and hollow where the support is weak.
    """
    from matplotlib.figure import Figure

    asked = [answer["held_out"]["contrast"]["feature"] for answer in explained["questions"]]
    moving = [row["feature"] for row in sorted(explained["importance"], key=lambda row: -row["held_out"]["value"])]
    features = [*dict.fromkeys([*asked, *moving])][:_PANELS]
    drawn = Figure(figsize=(13, 7), layout="constrained")
    for number, feature in enumerate(features):
        axes = drawn.add_subplot(2, 3, number + 1)
        axes.axhline(0, color="0.8", linewidth=0.8)
        for how, effects in explained["curves"][feature].items():
            _draw(axes, [one for one in effects if one["models"]], _COLOURS[how], LABELS[how])
        axes.set_title(feature, fontsize=10)
        axes.tick_params(axis="x", labelrotation=30, labelsize=7)
    if features:
        drawn.axes[0].legend(fontsize=7)
    drawn.suptitle(f"{task}: effect on the score, intervals over resampled families; hollow: fewer than 5 models or 3 families")
    return drawn


def _draw(axes: Any, effects: list[dict[str, Any]], colour: str, label: str) -> None:
    names, values = [one["name"] for one in effects], [one["effect"]["value"] for one in effects]
    ends = [one["effect"]["interval"] for one in effects]
    axes.plot(names, values, color=colour, linewidth=1, label=label)
    axes.vlines(names, [low for low, *_ in ends], [high for _, high, _ in ends], color=colour, linewidth=1, alpha=0.5)
    faces = [colour if one["support"] == "fair" else "white" for one in effects]
    axes.scatter(names, values, s=[10 + 2 * one["models"] for one in effects], c=faces, edgecolors=colour, zorder=3)


def _importance(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "task": task,
            "feature": row["feature"],
            "group": row["group"],
            **_estimate("held_out", row),
            **_estimate("in_sample", row),
        }
        for task, one in result["tasks"].items()
        for row in one["importance"]
    ]


def _curves(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "task": task, "feature": feature, "curve": how, "range": effect["name"], **_estimate("effect", effect),
            "models": str(effect["models"]), "families": str(len(effect["families"])), "support": effect["support"],
        }
        for task, one in result["tasks"].items()
        for feature, curves in one["curves"].items()
        for how, effects in curves.items()
        for effect in effects
    ]  # fmt: skip


def _pairs(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "task": task,
            **{name: " ".join(map(str, value)) if isinstance(value, list) else _text(value) for name, value in pair.items()},
        }
        for task, one in result["tasks"].items()
        for pair in one["matched"]["pairs"]
    ]


def _estimate(name: str, row: dict[str, Any]) -> dict[str, str]:
    low, high, _ = row[name]["interval"]
    return {name: _text(row[name]["value"]), f"{name} low": _text(low), f"{name} high": _text(high)}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
