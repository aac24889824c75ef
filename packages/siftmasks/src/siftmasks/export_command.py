"""The commands `siftmasks export` and `siftmasks report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lmcore.errors import UserError
from siftmasks.store_commands import BaseCommand, StoreCommand


@dataclass(frozen=True, kw_only=True)
class Export(BaseCommand):
    """Write the model that a task is served as a plain Hugging Face folder; or, with --maskless, that of users without a task."""

    task: tyro.conf.Positional[str | None] = None
    """Id of the task."""
    out: Path
    """Folder to write."""
    maskless: bool = False
    """Export the merged model without a mask."""
    scale: Literal["mean", "count", "density"] = "mean"
    """mean: 1/T, the paper's; count: mean over the tasks that move a weight; density: one number, mean over weights and tasks."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the trained tensors; the base's by default. What it loses of the delta is reported."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def run(self) -> dict[str, Any]:
        """Export, and return what was written and how much of the delta the dtype loses."""
        if self.maskless == (self.task is not None):
            raise UserError("export takes either a task or --maskless")
        from siftmasks.export import export

        return export(self.opened(), self.task, self.out, scale=self.scale, dtype=self.dtype, overwrite=self.overwrite)

    def show(self, result: dict[str, Any]) -> None:
        """Print what was written, and how much of the delta rounding to each dtype loses."""
        print(f"wrote {result['out']}: {result['tensors']} tensors, {result['bytes']:,} bytes")
        for dtype, loss in result["loss"].items():
            lost = "overflow" if loss["energy_lost"] is None else f"{loss['energy_lost']:.2%} of the delta's energy lost"
            print(f"  {dtype}: {lost}, {loss['unchanged']:.2%} of the weights that it moves stay as they are")


@dataclass(frozen=True, kw_only=True)
class Report(StoreCommand):
    """Write one HTML page about a store: configuration, tasks, digest, masks, ledger, storage and how much masks overlap."""

    out: Path
    """Folder for index.html and report.json."""
    overlap_tasks: int = 20
    """Tasks to compare with each other."""
    seed: int = 0
    """Chooses the tasks to compare, where there are more."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> dict[str, Any]:
        """Write the folder, and return the content of report.json."""
        from lmcore.record import published, write_json
        from siftmasks.store_report import describe, write_report

        with published(self.out, overwrite=self.overwrite) as out:
            result = describe(self.opened(), overlap_tasks=self.overlap_tasks, seed=self.seed)
            write_json(out / "report.json", result)
            write_report(out / "index.html", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print where the page is."""
        print(f"wrote {self.out / 'index.html'}")
