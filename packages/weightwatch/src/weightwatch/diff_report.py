"""The page of `weightwatch diff`: what a fine-tune changed, layer by layer, and the words it writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.report import Page
from weightwatch.diff import GRADES, Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 24
"""Characters of a token that are shown."""
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"


def write_page(comparison: Comparison, path: Path, *, directions: int = 60) -> None:
    """Write the page, self-contained; it lists the `directions` largest directions above the noise edge."""
    source = comparison.directions.source
    page = Page(f"{source['post']} against {source['base']}", f"{comparison.grade.capitalize()}. {GRADES[comparison.grade]}")
    for warning in comparison.warnings:
        page.text(warning)
    page.section("Where")
    page.figure(
        _figure(comparison),
        "Largest singular value of the difference of each residual writer, as a share of the norm of its base weight; below the broken "
        "line, the noise edge, is what rounding alone can do.",
    )
    page.section("What it writes")
    page.text(
        "Each direction is a singular vector of a weight difference. Its words are the tokens whose logits it raises, and lowers, most "
        "if nothing after it reacts (logit lens). Directions below the noise edge are left out."
    )
    page.table(direction_rows(comparison, directions))
    page.section("Residual writers")
    page.table(writer_rows(comparison))
    if comparison.others:
        page.section("Other tensors that differ")
        page.table(
            [{"tensor": one.name, "|Δ|/|W|": one.relative, "changed": f"{one.changed:.1%}"} for one in comparison.others[:100]]
        )
    page.write(path)


def direction_rows(comparison: Comparison, count: int) -> list[dict[str, Any]]:
    """The largest directions above the noise edge, each with its words at both ends."""
    found = [
        (sigma, f"{one.label}_u{i}", sigma / one.edge if one.edge else None)
        for one in comparison.directions.writers
        for i, sigma in enumerate(one.sigma[: one.signal])
    ]
    rows = []
    for sigma, label, ratio in sorted(found, key=lambda one: (-one[0], one[1]))[:count]:
        spoken = comparison.words.get(label)
        ends = {"raises": _shown(spoken.high), "lowers": _shown(spoken.low)} if spoken else {}
        rows.append({"direction": label, "σ": sigma, "σ / edge": ratio, **ends})
    return rows


def writer_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per residual writer."""
    return [
        {
            "writer": one.label, "tensor": one.name, "σ1": one.sigma[0] if one.sigma else 0.0, "edge": one.edge,
            "above the edge": f"{one.signal}{'+' if one.signal == len(one.sigma) else ''}",
            "stable rank": one.stable_rank, "|Δ|/|W|": one.norm / one.base_norm if one.base_norm else None,
            "changed": f"{one.changed:.1%}" if one.changed is not None else "-",
        }
        for one in comparison.directions.writers
    ]  # fmt: skip


def _shown(ends: Sequence[tuple[str, float]]) -> str:
    """Tokens side by side, the end of a long one left out: a row of spaces has no place to break, and would push columns off the page."""
    texts = [repr(token)[1:-1].replace(" ", "␣") for token, _ in ends]
    return " ".join(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in texts)


def _figure(comparison: Comparison) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for kind, color, name in (("attention", _BLUE, "attention output"), ("mlp", _ORANGE, "MLP down projection")):
        chosen = [
            (one, one.base_norm) for one in comparison.directions.writers if one.kind == kind and one.norm and one.base_norm
        ]
        layers = [one.layer for one, _ in chosen]
        axes.plot(layers, [one.sigma[0] / norm for one, norm in chosen], "o-", color=color, label=name, markersize=4)
        axes.plot(layers, [one.edge / norm for one, norm in chosen], "--", color=color, linewidth=1, alpha=0.6)
    axes.plot([], [], "--", color=_GREY, linewidth=1, label="noise edge")
    axes.set(
        xlabel="layer", ylabel="σ1 / |W|", yscale="log" if any(one.norm for one in comparison.directions.writers) else "linear"
    )
    last = max((one.layer for one in comparison.directions.writers), default=0)
    axes.set_xlim(-0.5, last + 0.5)  # of all layers, those that are equal too
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
