"""The command `weightwatch adapters`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError
from weightwatch.places import check_apart


@dataclass(frozen=True, kw_only=True)
class Adapters(Command):
    """Scan a folder of LoRA adapters: rank directions that look like the mark of a trigger, and group adapters that share them."""

    folder: tyro.conf.Positional[Path]
    """Folder with adapters of peft in it, or below it."""
    base: str | None = None
    """Base model of the adapters, if it is at hand: its config.json tells which matrices write to the residual stream."""
    k: int = 2
    """Directions per matrix that are compared between adapters."""
    same: float = 0.9
    """|cos| from which two directions are taken for one."""
    rows: int = 20
    """Marks to print."""
    out: Path | None = None
    """File for all marks and families, as JSON."""
    overwrite: bool = False
    """Replace that file."""

    def run(self) -> dict[str, Any]:
        """Scan; return all marks, most suspicious first, and the families."""
        from lmcore.record import write_json
        from weightwatch.adapters import scan_adapters

        if self.k < 1 or self.rows < 0 or not 0 < self.same <= 1:
            raise UserError("--k is at least 1, --rows at least 0, and --same above 0 and at most 1")
        if self.out is not None:
            check_apart(self.out, [self.folder])
            if self.out.exists() and not self.overwrite:
                raise UserError(f"{self.out} exists: choose another --out or pass --overwrite")
        found = scan_adapters(self.folder, k=self.k, base=self.base, same=self.same, progress=True)
        result = {
            "adapters": [*found.adapters], "marks": [{**asdict(mark), "suspicion": mark.suspicion} for mark in found.marks],
            "families": [asdict(family) for family in found.families], "failed": found.failed,
            "warnings": {adapter: [*texts] for adapter, texts in found.warnings.items() if texts},
        }  # fmt: skip
        if self.out is not None:
            write_json(self.out, result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the first marks, the families and what could not be read."""
        print_table([
            {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in mark.items()}
            for mark in result["marks"][: self.rows]
        ])  # fmt: skip
        for family in result["families"]:
            print(f"{', '.join(family['adapters'])} share {', '.join(family['shared'])} (|cos| >= {family['cosine']:.3f})")
        for adapter, why in result["failed"].items():
            print(f"{adapter} was not read: {why}")
