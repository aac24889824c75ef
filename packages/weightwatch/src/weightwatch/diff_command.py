"""The command `weightwatch diff`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Diff(Command):
    """Show what a fine-tune changed: how large and how concentrated, layer by layer, and the words it writes. No forward pass, no data."""

    base: tyro.conf.Positional[str]
    """The model it started from: folder, .safetensors file or Hub id."""
    post: tyro.conf.Positional[str]
    """The fine-tuned model."""
    k: int = 20
    """Directions per matrix."""
    words: int = 8
    """Words at each end of a direction."""
    out: Path | None = None
    """Folder for diff.json and diff.html."""
    overwrite: bool = False
    """Replace what an earlier diff wrote there."""

    def run(self) -> dict[str, Any]:
        """Compare; return what diff.json has."""
        from lmcore.record import published, write_json
        from weightwatch.diff import diff
        from weightwatch.diff_report import direction_rows, write_page, writer_rows
        from weightwatch.places import check_place

        if self.k < 1 or self.words < 1:
            raise UserError("--k and --words are at least 1")
        if self.out is not None:
            check_place(self.out, [Path(self.base), Path(self.post)], self.overwrite, "diff.json")
        comparison = diff(self.base, self.post, k=self.k, top=self.words, seed=self.seed, progress=True)
        result = comparison.as_json()
        if self.out is not None:
            with published(self.out, overwrite=self.overwrite) as folder:
                write_json(folder / "diff.json", result)
                write_page(comparison, folder / "diff.html")
        return {**result, "tables": {"directions": direction_rows(comparison, 12), "writers": writer_rows(comparison)}}

    def show(self, result: dict[str, Any]) -> None:
        """Print the grade, the largest directions with their words, and the matrices that changed most."""
        print(f"{result['grade']}: {result['meaning']}\n")
        print_table([_texts(row) for row in result["tables"]["directions"]])
        writers = sorted(result["tables"]["writers"], key=lambda row: -(row["|Δ|/|W|"] or 0.0))[:10]
        if writers:
            print(f"\n{min(10, len(writers))} of {len(result['writers'])} residual writers, those that changed most first")
            print_table([_texts(row) for row in writers])
        print(f"\n{result['equal']} tensors are equal; {len(result['others'])} differ that do not write to the residual stream")
        if self.out is not None:
            print(f"all of it: {self.out / 'diff.html'}")


def _texts(row: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
        for name, value in row.items()
    }
