"""One self-contained HTML page: text, tables and figures in a single file that can be mailed."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.record import write_atomically

_META = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'


class Page:
    """A page built from the top down and written once.

    >>> page = Page("Pass@k", "Two checkpoints on 500 problems.")
    >>> page.table([{"k": 1, "Pass@k": 0.083}, {"k": 64, "Pass@k": 0.83}], "Unbiased estimates.")
    >>> page.write(Path(tempfile.mkdtemp()) / "index.html")
    """

    def __init__(self, title: str, lead: str = ""):
        style, heading = Path(__file__).with_name("report.css").read_text(), html.escape(title)
        self._parts = [f"{_META}<style>\n{style}</style><title>{heading}</title></head><body>", f"<h1>{heading}</h1>"]
        self._parts += [f'<p class="lead">{html.escape(lead)}</p>'] if lead else []

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
        shown = [
            {c: f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v) for c, v in row.items()} for row in rows
        ]
        numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}
        style = {c: ' class="number"' if c in numeric else "" for c in columns}
        head = "".join(f"<th{style[c]}>{html.escape(c)}</th>" for c in columns)
        lines = ("".join(f"<td{style[c]}>{html.escape(row.get(c, '-'))}</td>" for c in columns) for row in shown)
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
