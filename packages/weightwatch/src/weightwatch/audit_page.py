"""The page of `weightwatch audit`: one file to browse directions, with what drives them and what they write."""

import json
from pathlib import Path
from typing import Any

from lmcore.record import write_atomically
from weightwatch.audit import Audit, End
from weightwatch.top_tokens import BINS


def write_page(audit: Audit, path: Path, *, title: str, lead: str = "") -> None:
    """Write the page, self-contained: a list of directions to sort and search, and the ends of each.

    Whatever the texts hold, they stay text: the data are JSON in which nothing can close their element, and the script sets text,
    never HTML.
    About 11 MB for 1,000 directions with 10 transcripts at both ends in both roles.
    """
    texts: dict[tuple[str, str], int] = {}  # one entry for all ends that a text is at
    rows: list[dict[str, Any]] = []
    for one in audit.directions:
        ends = [_end(end, texts) for end in one.ends]
        facts = {"label": one.label, "layer": one.layer, "sigma": one.sigma, "range": round(one.range, 6)}
        rows.append({**facts, "raises": one.raises, "lowers": one.lowers, "ends": ends})
    data = {"title": title, "lead": lead, "bins": BINS, "texts": list(texts), "directions": rows}
    template = Path(__file__).with_name("audit_page.html").read_text(encoding="utf-8")
    before, after = template.split("__DATA__")
    write_atomically(path, before + as_element(data) + after)


def as_element(data: Any) -> str:
    r"""JSON that can stand in a `script` element: "<", ">" and "&" are written as escapes, lone surrogates too.

    >>> as_element(["</script><!--"])
    '["\\u003c/script\\u003e\\u003c!--"]'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "backslashreplace").decode()  # what UTF-8 lacks are surrogates: JSON escapes them alike


def _end(end: End, texts: dict[tuple[str, str], int]) -> dict[str, Any]:
    lines = []
    for one in end.transcripts:
        text = ("…" if one.cut else "") + one.before, one.token
        lines.append((one.rank, one.id, one.cosine, one.position, texts.setdefault(text, len(texts))))
    names = ("role", "side", "inputs", "first_bin", "histogram", "duplicates", "label")
    return {**{name: getattr(end, name) for name in names}, "keywords": end.keywords, "transcripts": lines}
