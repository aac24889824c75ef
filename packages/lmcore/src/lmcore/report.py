"""One self-contained HTML page: text, tables and figures in a single file that can be mailed."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.record import write_atomically

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.lead { opacity: .8; margin-top: 0; } figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, caption { font-size: .9rem; opacity: .8; text-align: left; padding: .3rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; margin: 1rem 0; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } th { background: var(--soft); }
</style>"""


class Page:
    """A page built from the top down and written once.

    >>> page = Page("Pass@k", "Two checkpoints on 500 problems.")
    >>> page.section("Results")
    >>> page.table([{"k": 1, "Pass@k": 0.083}, {"k": 64, "Pass@k": 0.83}], "Unbiased estimates.")
    >>> page.write(Path(tempfile.mkdtemp()) / "index.html")
    """

    def __init__(self, title: str, lead: str = ""):
        escaped = html.escape(title)
        self._parts = [f"{_HEAD}<title>{escaped}</title></head><body>", f"<h1>{escaped}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def section(self, heading: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(heading)}</h2>")

    def text(self, paragraph: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """Add a table: one mapping per row, columns from the first; numbers stand right, floats show four digits."""
        if not rows:
            return
        columns = list(rows[0])
        numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}
        style = {c: ' class="number"' if c in numeric else "" for c in columns}
        head = "".join(f"<th{style[c]}>{html.escape(c)}</th>" for c in columns)
        lines = ("".join(f"<td{style[c]}>{html.escape(_cell(row.get(c)))}</td>" for c in columns) for row in rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        top = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(f'<div class="wide"><table>{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, figure: Any, caption: str) -> None:
        """Add a matplotlib figure as inline SVG; the caption is its text alternative too."""
        text = html.escape(caption)
        drawn = svg(figure).replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
        self._parts.append(f"<figure>{drawn}<figcaption>{text}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_atomically(path, "\n".join([*self._parts, "</body></html>\n"]))


def svg(figure: Any) -> str:
    """A matplotlib figure as an SVG element: the same figure gives the same bytes (no date, ids from a fixed salt)."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tenfold", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
