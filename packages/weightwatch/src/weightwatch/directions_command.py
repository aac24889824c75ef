"""The command `weightwatch directions`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError
from weightwatch.places import check_place

if TYPE_CHECKING:
    from weightwatch import directions


@dataclass(frozen=True, kw_only=True)
class Directions(Command):
    """Find the directions that a fine-tune writes to the residual stream: the singular vectors of POST - BASE.

    Reads two checkpoints, one matrix at a time, and builds no model. Writes directions.safetensors and directions.json to OUT, where the
    other commands find them. Singular values up to the noise edge may be mere rounding and count as no signal.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Folders, files or Hub ids: BASE POST; MODEL with --raw; ADAPTER or BASE ADAPTER with --adapter."""
    out: Path
    """Folder to write."""
    k: int = 20
    """Directions of each matrix."""
    raw: bool = False
    """Take the weights of a model themselves, where its base is not at hand."""
    adapter: bool = False
    """The second (or only) source is a LoRA adapter: its difference is exact and needs no weights of the base."""
    overwrite: bool = False
    """Replace OUT if it exists and holds directions."""

    def run(self) -> dict[str, Any]:
        """Find the directions, write them and return a row per matrix."""
        from weightwatch.directions import Directions as Found

        self._check()
        *base, post = self.sources
        if self.raw:
            found = Found.raw(post, self.k, seed=self.seed, progress=True)
        elif self.adapter:
            found = Found.of_adapter(post, self.k, base=base[0] if base else None)
        else:
            found = Found.of(base[0], post, self.k, seed=self.seed, progress=True)
        found.save(self.out, overwrite=self.overwrite)
        facts = {"model_type": found.model_type, "k": self.k, "signal": found.signal, "warnings": list(found.warnings)}
        return {
            "out": str(self.out),
            "digest": found.digest,
            **found.source,
            **facts,
            "matrices": [_row(one) for one in found.writers],
        }

    def show(self, result: dict[str, Any]) -> None:
        """Print a line per matrix and what they add up to."""
        print_table([
            {
                "writer": row["label"], "signal": str(row["signal"]), "structured": str(row["structured"]),
                "sigma_1": f"{row['sigma_1']:.4g}", "edge": f"{row['edge']:.4g}", "stable rank": f"{row['stable_rank']:.1f}",
                "change": "-" if row["relative_norm"] is None else f"{row['relative_norm']:.2%}", "matrix": row["name"],
            }
            for row in result["matrices"]
        ])  # fmt: skip
        if result["signal"]:
            print(f"{result['signal']} directions above the noise edge; wrote {self.out}")
        else:
            print(f"no difference above rounding; wrote {self.out}")

    def _check(self) -> None:
        counts = (1,) if self.raw else (1, 2) if self.adapter else (2,)
        if self.raw and self.adapter:
            raise UserError("--raw and --adapter exclude each other: an adapter is a difference already")
        if len(self.sources) not in counts:
            wanted = "MODEL" if self.raw else "ADAPTER or BASE ADAPTER" if self.adapter else "BASE POST"
            raise UserError(f"{len(self.sources)} sources where {wanted} was expected")
        if self.k < 1:
            raise UserError(f"--k {self.k}: it must be at least 1")
        check_place(self.out, [Path(source) for source in self.sources], self.overwrite, "directions.json")


def _row(one: "directions.WriterDirections") -> dict[str, Any]:
    return {
        "label": one.label, "name": one.name, "shape": one.shape, "signal": one.signal, "structured": one.structured,
        "sigma_1": one.sigma[0], "edge": one.edge,
        "bulk": one.bulk, "stable_rank": one.stable_rank, "norm": one.norm, "changed": one.changed,
        "relative_norm": one.norm / one.base_norm if one.base_norm else None,
        "largest_residual": max((r for r, value in zip(one.residuals, one.sigma, strict=True) if value > one.edge), default=0.0),
    }  # fmt: skip
