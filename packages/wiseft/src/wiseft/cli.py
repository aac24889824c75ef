"""The command `wiseft`. Options are the fields below; what takes time to import is imported inside `run`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from lmcore import cli
from wiseft.passk_command import PassK
from wiseft.sample_command import Sample
from wiseft.select_command import Select


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(cli.Command):
    """Interpolate two checkpoints: delta * EARLY + (1 - delta) * LATE.

    Computed in float64 and rounded once. Config and tokenizer come from LATE. Two LoRA adapters give an adapter whose product BA is
    interpolated.
    """

    early: tyro.conf.Positional[str]
    """Folder, file or Hub id of the early checkpoint."""
    late: tyro.conf.Positional[str]
    """Folder, file or Hub id of the late checkpoint."""
    out: Path
    """Folder to write; with several deltas, the folder that holds delta-0.30/ and so on."""
    delta: tuple[float, ...] = (0.5,)
    """Weight of EARLY. Several deltas read each input once."""
    module_deltas: Path | None = None
    """JSON file of regex -> delta; the first regex found in a tensor's name wins over --delta."""
    missing: Literal["error", "late", "early"] = "error"
    """Where a tensor that one of them lacks comes from: follow LATE, follow EARLY, or stop."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the output; LATE's by default."""
    rank: int | None = None
    """For adapters only: truncate the exact result (rank r1 + r2) to this rank."""
    dry_run: bool = False
    """Print what would be done, with bytes, and write nothing."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def run(self) -> dict[str, Any]:
        """Merge, and return counts, warnings and digests."""
        from wiseft.merging import merge
        from wiseft.plan import read_module_deltas

        return merge(
            self.early,
            self.late,
            self.out,
            delta=self.delta if len(self.delta) != 1 else self.delta[0],
            module_deltas=read_module_deltas(self.module_deltas) if self.module_deltas else None,
            missing=self.missing,
            dtype=self.dtype,
            rank=self.rank,
            overwrite=self.overwrite,
            dry_run=self.dry_run,
        )

    def show(self, result: dict[str, Any]) -> None:
        """Print one line per output."""
        _show_outputs(result, self.dry_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup(cli.Command):
    """Average two or more checkpoints, rounded once; config and tokenizer come from the last."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """Folders, files or Hub ids."""
    out: Path
    """Folder to write."""
    weights: tuple[float, ...] | None = None
    """One weight per checkpoint, normalised to sum to 1; equal by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the output; the last checkpoint's by default."""
    dry_run: bool = False
    """Print what would be done, with bytes, and write nothing."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def run(self) -> dict[str, Any]:
        """Average, and return counts and digests."""
        from wiseft.merging import soup

        return soup(
            self.checkpoints, self.out, weights=self.weights, dtype=self.dtype, overwrite=self.overwrite, dry_run=self.dry_run
        )

    def show(self, result: dict[str, Any]) -> None:
        """Print one line per output."""
        _show_outputs(result, self.dry_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(cli.Command):
    """Repeat a merge from its wiseft.json without writing, and compare every byte."""

    out: tyro.conf.Positional[Path]
    """A folder that `wiseft merge` or `wiseft soup` wrote."""
    sources: tuple[str, ...] | None = None
    """Where the inputs are now, in the order of the recipe, if they have moved."""

    def run(self) -> dict[str, Any]:
        """Compare; a difference is an error that names the tensor."""
        from wiseft.verification import verify

        return verify(self.out, self.sources)

    def show(self, result: dict[str, Any]) -> None:
        """Print what was compared."""
        print(f"{self.out}: {result['tensors']} tensors, {result['bytes']:,} bytes: equal to its recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline(cli.HeadlineCommand):
    """Test the paper's claims in an arithmetic world where Pass@k is exact, and merge two real checkpoints."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run `wiseft.headline.headline`."""
        from wiseft.headline import headline

        return "wiseft", headline(out, scale=self.scale, seed=self.seed)


def _show_outputs(result: dict[str, Any], dry_run: bool) -> None:
    verb = "would write" if dry_run else "wrote"
    for out in result["outputs"]:
        print(f"{verb} {out}: {result['bytes_per_output']:,} bytes")
    mixed, copied = result["tensors_interpolated"], result["tensors_copied"]
    print(f"{mixed} tensors interpolated ({result['weights_interpolated']:,} weights), {copied} copied")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; the console script of the package."""
    commands = [Merge, Soup, Verify, PassK, Sample, Select, Headline]
    description = (
        "Interpolate an early and a late checkpoint so that Pass@k recovers; measure Pass@k, its bias and its variance."
    )
    sys.exit(cli.main("wiseft", description, commands, args))
