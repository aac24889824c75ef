"""The command `weightwatch bake`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lmcore.cli import Command, print_table


@dataclass(frozen=True, kw_only=True)
class Bake(Command):
    """Write a copy of the model without chosen directions: no hooks are needed to run it."""

    directions: tyro.conf.Positional[Path]
    """Folder that `weightwatch directions` wrote."""
    post: tyro.conf.Positional[str]
    """The fine-tuned model: folder, .safetensors file or Hub id."""
    labels: tyro.conf.Positional[tuple[str, ...]]
    """Directions to take out, such as D4_u0 O7_u2."""
    out: Path
    """Folder for the new model."""
    mode: Literal["revert", "remove"] = "revert"
    """revert takes back what the fine-tune wrote along them (needs --base), remove stops their blocks from writing along them at all."""
    base: str | None = None
    """The model it started from, in mode revert."""
    overwrite: bool = False
    """Replace an earlier bake."""

    def run(self) -> dict[str, Any]:
        """Write the model; return what weightwatch.json has, and where it is."""
        from weightwatch.bake import bake
        from weightwatch.directions import Directions

        found = Directions.load(self.directions)
        return bake(found, self.post, self.out, self.labels, mode=self.mode, base=self.base, overwrite=self.overwrite)

    def show(self, result: dict[str, Any]) -> None:
        """Print how far each tensor moved."""
        rows = result["tensors"].items()
        print_table(
            [{"tensor": name, "moved": f"{one['moved']:.3g}", "lost to rounding": f"{one['lost']:.2%}"} for name, one in rows]
        )
        print(f"{result['out']}: a model without {', '.join(result['directions'])}")
