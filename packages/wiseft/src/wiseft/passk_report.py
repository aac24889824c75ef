"""The page, the figures and the tables of `wiseft passk`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcore.record import write_atomically
from lmcore.report import Page, svg
from wiseft import curves
from wiseft.comparison import Comparison
from wiseft.summary import Summary

Json = dict[str, Any]


def write_report(out: Path, models: Mapping[str, Summary], comparison: Comparison | None, result: Json) -> None:
    """Write `index.html` and one SVG file per figure into `out`; `result` is the content of result.json."""
    ks, level = result["k"], f"{result['level']:.0%}"
    page = Page(f"Pass@k of {' and '.join(models)}", "Unbiased estimates from judged samples, with intervals over problems.")

    def add(name: str, figure: Any, caption: str) -> None:
        write_atomically(out / f"{name}.svg", svg(figure))
        page.figure(figure, caption)

    for model in result["models"]:
        page.section(model["name"])
        page.text(moments_line(model))
        page.table(model_rows(model, ks, level))
        for line in needed_lines(model):
            page.text(line)
    page.section("Pass@k")
    add(
        "pass_at_k",
        curves.pass_at_k_figure(models, ks),
        f"Pass@k with {level} intervals, and the bound from bias and variance.",
    )
    if comparison is not None:
        first, second = models
        page.section(f"{first} minus {second}")
        page.table(comparison_rows(result, level), "p: sign-flip permutation test on the differences per problem.")
        caption = f"Paired difference of Pass@k with its {level} interval over problems."
        add("difference", curves.difference_figure(comparison, (first, second), ks), caption)
    page.section("Bias and variance of Pass@1")
    if any(summary.variance for summary in models.values()):
        k = _telling_k(models, ks)
        caption = (
            f"Low and left is better: along a line the upper bound on Pass@{k} is equal. No model can lie in the grey area."
        )
        add("bias_variance", curves.bias_variance_figure(models, k), caption)
    add("histogram", curves.histogram_figure(models), "Problems by the share of their samples that are correct.")
    page.write(out / "index.html")


def moments_line(model: Json) -> str:
    """Problems, samples, bias and variance of a model in one line."""
    least, most = model["samples_per_problem"]
    samples = f"{least} samples each" if least == most else f"{least} to {most} samples each"
    line = f"{model['name']}: {model['problems']:,} problems, {samples}; bias {_number(model['bias'])}"
    if model["variance"]:
        line += f", variance {_number(model['variance'])} (naive {model['naive_variance']:.4f})"
    return line


def model_rows(model: Json, ks: list[int], level: str) -> list[dict[str, str]]:
    """A row per k: Pass@k with its interval and bound, and the votes where they were asked for."""
    known = {row["k"]: row for row in model["pass_at_k"]}
    rows = []
    for i, k in enumerate(ks):
        row = known[k]
        bound = row["upper_bound"]
        cells = {"k": str(k), "Pass@k": f"{row['value']:.2%}", f"{level} interval": _percents(row)}
        cells["upper bound"] = "-" if bound is None else f"{bound:.2%}"
        for name, title in (("majority_at_k", "majority@k"), ("best_at_k", "Best@k")):
            if name in model:
                cells |= {title: f"{model[name][i]['value']:.2%}", f"{title} interval": _percents(model[name][i])}
        rows.append(cells)
    return rows


def comparison_rows(result: Json, level: str) -> list[dict[str, str]]:
    """A row per k, then bias and variance: the difference, its interval and its p-value."""
    comparison = result["comparison"]
    asked = [row for row in comparison["pass_at_k"] if row["k"] in result["k"]]
    rows = [
        {
            "of": f"Pass@{row['k']}",
            "difference": f"{row['value']:+.2%}",
            f"{level} interval": _percents(row),
            "p": "-" if row["p_value"] is None else f"{row['p_value']:.4f}",
        }
        for row in asked
    ]
    for name in ("bias", "variance"):
        if comparison[name]:
            low, high = (comparison[name]["interval"] or (None, None))[:2]
            interval = "-" if low is None else f"[{low:+.4f}, {high:+.4f}]"
            rows.append(
                {"of": name, "difference": f"{comparison[name]['value']:+.4f}", f"{level} interval": interval, "p": "-"}
            )
    return rows


def needed_lines(model: Json) -> list[str]:
    """What the target width asks for, a line per k; nothing without one."""
    return [f"Pass@{row['k']}: the interval is {row['width']:.4f} wide; {row['advice']}" for row in model.get("needed", [])]


def _telling_k(models: Mapping[str, Summary], ks: list[int]) -> int:
    """The largest k asked for at which the bounds still differ from 1 to the eye; 2 if there is none."""
    rows = [row for summary in models.values() for row in summary.pass_at_k]
    dull = {row.k for row in rows if row.upper_bound is None or row.upper_bound > 0.99}
    return max(set(ks) - dull, default=2)


def _number(estimate: Json) -> str:
    if estimate["interval"] is None:
        return f"{estimate['value']:.4f}"
    low, high, _ = estimate["interval"]
    return f"{estimate['value']:.4f} [{low:.4f}, {high:.4f}]"


def _percents(estimate: Json) -> str:
    low, high, _ = estimate["interval"]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"
