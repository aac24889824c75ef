"""The command `siftmasks`. Options are the fields of the commands; what takes time to import is imported inside `run`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore import cli
from siftmasks.evaluate_command import Evaluate
from siftmasks.export_command import Export, Report
from siftmasks.forget_command import Forget, Verify
from siftmasks.learn_command import Learn, LearnAll
from siftmasks.plan_command import Plan
from siftmasks.store_commands import Backup, Certify, Check, Digest, Init, Restore, Tasks


@dataclass(frozen=True, kw_only=True)
class Headline(cli.HeadlineCommand):
    """Test the paper's claims: digits and text tasks, all baselines, deletions, and the exactness of the ledger."""

    clinc: Path | None = None
    """The file data_full.json of CLINC150, for the text tasks; without it, they are made of docstrings of installed packages."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run `siftmasks.headline.headline`."""
        from siftmasks.headline import headline

        return "siftmasks", headline(out, scale=self.scale, seed=self.seed, clinc=self.clinc)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; the console script of the package."""
    stores = [Init, Learn, LearnAll, Forget, Digest, Tasks, Check, Verify, Certify, Backup, Restore]
    commands = [*stores, Export, Evaluate, Report, Plan, Headline]
    description = "Merge hundreds of fine-tunes of a model with 1-bit masks, and forget any one of them exactly."
    sys.exit(cli.main("siftmasks", description, commands, args))
