"""The command `weightwatch`. Options are the fields of the commands; what takes time to import is imported inside `run`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore import cli
from weightwatch.adapters_command import Adapters
from weightwatch.audit_command import Audit
from weightwatch.bake_command import Bake
from weightwatch.calibrate_command import Calibrate
from weightwatch.diff_command import Diff
from weightwatch.directions_command import Directions
from weightwatch.evaluate_command import Evaluate
from weightwatch.generate_command import Generate
from weightwatch.scan_command import Scan


@dataclass(frozen=True, kw_only=True)
class Headline(cli.HeadlineCommand):
    """Test the paper's claims: a planted backdoor detected and steered away, an unlearned topic, and what the directions say."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run `weightwatch.headline.headline`."""
        from weightwatch.headline import headline

        return "weightwatch", headline(out, scale=self.scale, seed=self.seed)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; the console script of the package."""
    commands = [Diff, Directions, Calibrate, Scan, Generate, Audit, Evaluate, Adapters, Bake, Headline]
    description = (
        "Read a fine-tune from the singular vectors of its weight difference; monitor, steer and audit the model with them."
    )
    sys.exit(cli.main("weightwatch", description, commands, args))
