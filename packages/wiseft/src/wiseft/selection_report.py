"""The page, the figure and the tables of `wiseft select`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lmcore.report import Page
from wiseft.barrier import DELTAS, NOTABLE

Json = dict[str, Any]

# Okabe and Ito's colours: apart for every kind of colour vision.
_COLOURS = {"chosen": "#0072B2", "not told apart": "#D55E00", "eliminated": "#999999"}
_HELD_OUT = "#000000"


def write_report(path: Path, result: Json) -> None:
    """Write the page; `result` is the content of result.json."""
    page = Page(f"Selection for Pass@{result['k']}", decision_text(result))
    page.section("Candidates")
    page.figure(
        candidates_figure(result),
        f"Pass@{result['k']} in the race with {result['level']:.0%} intervals: the chosen candidate, then who ran longest. "
        "Candidates leave by their differences on the same problems, so intervals may overlap.",
    )
    page.table(candidate_rows(result), "Each interval holds whenever its candidate stopped, for that candidate taken alone.")
    page.text(spent_text(result))
    page.section("On problems held out")
    page.text(held_out_text(result))
    page.table(held_out_rows(result))
    page.section("Loss along the segment from LATE to each EARLY")
    page.text(
        "Mean loss of the reference answers in nats per token. The barrier is the most by which it exceeds the line between its ends; "
        f"above {NOTABLE} it is marked, and interpolation may be worse than both ends."
    )
    page.table(barrier_rows(result))
    page.write(path)


def candidates_figure(result: Json) -> Figure:
    """Every candidate's Pass@k with its interval, best on top; squares are LATE alone, diamonds the estimates held out."""
    rows = result["candidates"]
    figure = Figure(figsize=(7.2, 1.2 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        low, high, _ = row["interval"]
        colour = _COLOURS[_kind(row)]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
        axes.plot(row["pass_at_k"], place, color=colour, marker="o" if row["early"] else "s", markersize=5)
    held_out = result["held_out"]
    for role in ("chosen", "late") if held_out else ():
        place = next(i for i, row in enumerate(rows) if row["name"] == held_out[role]["name"])
        low, high, _ = held_out[role]["pass_at_k"]["interval"]
        axes.plot([low, high], [place + 0.3] * 2, color=_HELD_OUT, linewidth=0.8)
        axes.plot(held_out[role]["pass_at_k"]["value"], place + 0.3, color=_HELD_OUT, marker="D", markersize=3.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"Pass@{result['k']}")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", color="#00000018")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in _COLOURS if any(_kind(row) == kind for row in rows)]
    legend = [Line2D([], [], color=_COLOURS[kind], marker="o", markersize=5, label=kind) for kind in kinds]
    legend.append(Line2D([], [], color="#666666", marker="s", markersize=5, linewidth=0, label="LATE alone"))
    if held_out:
        legend.append(Line2D([], [], color=_HELD_OUT, marker="D", markersize=3.5, linewidth=0.8, label="held out"))
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=8)
    return figure


def decision_text(result: Json) -> str:
    """What was decided, and how surely."""
    chosen, k = result["chosen"], result["k"]
    others = sum(row["status"] == "not told apart" for row in result["candidates"])
    error = f"{1 - result['level']:.3g}"
    kept = f"A race eliminates the best candidate with probability at most {error}"
    if result["decision"] == "one left":
        return f"{chosen} has the best Pass@{k}: all others are eliminated. {kept}."
    if result["decision"] == "within tolerance":
        within = f"its Pass@{k} is within {result['tolerance']:g} of the best"
        return f"{chosen} is chosen: {within}, and with probability at most {error} this is wrong."
    return (
        f"Undecided: {chosen} has the highest Pass@{k}, but the problems did not tell it apart from {others} "
        f"other{'s' if others > 1 else ''}. {kept}: expect it among these {others + 1}."
    )


def candidate_rows(result: Json) -> list[dict[str, str]]:
    """A row per candidate, in the order of the result."""
    return [
        {
            "candidate": row["name"],
            "problems": str(row["problems"]),
            f"Pass@{result['k']}": f"{row['pass_at_k']:.2%}",
            f"{result['level']:.0%} interval": _percents(row["interval"]),
            "Pass@1": f"{row['pass_at_1']:.2%}",
            "status": row["status"],
        }
        for row in result["candidates"]
    ]


def spent_text(result: Json) -> str:
    """What the race cost, what it saved, and whether answers were cut off."""
    spent = result["sampling"]
    share = 1 - spent["samples"] / spent["samples_without_race"]
    longest = max(result["candidates"], key=lambda row: row["cut_off"])
    cut_off = f" Of the samples of {longest['name']}, {longest['cut_off']:.0%} were cut off: see --max-new-tokens."
    return (
        f"The race drew {spent['samples']:,} samples ({spent['tokens']:,} tokens), {share:.0%} fewer than all candidates on all "
        f"{spent['problems']} problems would have taken, and so saved about {spent['tokens_saved']:,} tokens."
        + (cut_off if longest["cut_off"] else "")
    )


def held_out_text(result: Json) -> str:
    """How to read the Pass@k of the chosen one."""
    highest = f"The Pass@{result['k']} of the chosen candidate in the race is the highest of many, and so too high on average"
    if result["held_out"] is None:
        return f"{highest}; no problems were held out to measure it anew (--holdout 0)."
    return f"{highest}. These are {result['held_out']['problems']} problems that had no part in the choice."


def held_out_rows(result: Json) -> list[dict[str, str]]:
    """The chosen one, LATE alone and their difference; nothing if no problems were held out."""
    held_out = result["held_out"]
    if held_out is None:
        return []
    shown = [("chosen: " + held_out["chosen"]["name"], held_out["chosen"], "")]
    if held_out["difference"]:
        shown += [(held_out["late"]["name"], held_out["late"], ""), ("difference", held_out["difference"], "+")]
    return [
        {
            "": name,
            f"Pass@{result['k']}": f"{estimates['pass_at_k']['value']:{sign}.2%}",
            f"{result['level']:.0%} interval": _percents(estimates["pass_at_k"]["interval"]),
            "Pass@1": f"{estimates['pass_at_1']['value']:{sign}.2%}",
            "interval": _percents(estimates["pass_at_1"]["interval"]),
        }
        for name, estimates, sign in shown
    ]


def barrier_rows(result: Json) -> list[dict[str, str]]:
    """A row per EARLY: the loss at each delta, and the barrier."""
    return [
        {
            "EARLY": row["early"],
            **{f"delta {delta:g}": f"{loss:.4f}" for delta, loss in zip(DELTAS, row["losses"], strict=True)},
            "barrier": f"{row['height']:.4f}" + (f" at delta {row['delta']:g} (!)" if row["height"] > NOTABLE else ""),
        }
        for row in result["barriers"]
    ]


def _kind(row: Json) -> str:
    return "eliminated" if row["status"].startswith("eliminated") else str(row["status"])


def _percents(interval: tuple[float, float, float]) -> str:
    return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
