"""Tables for a terminal."""

from collections.abc import Mapping, Sequence


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print one row per mapping under a line of column names, the first column left-aligned; nothing without rows."""
    width = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]} if rows else {}
    for row in [dict(zip(width, width, strict=True)), *rows] if rows else []:
        first, *others = width
        cells = [f"{row[first]:<{width[first]}}", *(f"{row[column]:>{width[column]}}" for column in others)]
        print("  ".join(cells).rstrip())
