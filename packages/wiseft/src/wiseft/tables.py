"""Tables for a terminal."""

from collections.abc import Sequence


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print one row per mapping under a line of column names, right-aligned; nothing without rows."""
    width = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]} if rows else {}
    for row in [dict(zip(width, width, strict=True)), *rows] if rows else []:
        print("  ".join(f"{cell:>{width[column]}}" for column, cell in row.items()))
