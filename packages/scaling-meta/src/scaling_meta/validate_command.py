"""The command `scaling-meta validate`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Validate(Command):
    """Check every row of a database: columns, categories, ranges, sums of shares, duplicates; and list where sources disagree.

    Problems go to stderr, one a line, and end the command with status 2.
    """

    database: tyro.conf.Positional[Path | None] = None
    """Folder of the database; the shipped one by default."""

    def run(self) -> dict[str, Any]:
        """Return the counts, the conflicts and the share of models for which each feature is missing."""
        from scaling_meta.database import Database

        database, problems = Database.inspect(self.database or Database.shipped_folder())
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            raise UserError(f"{self.database}: {len(problems)} problems, listed above: mend those rows")
        return {
            "models": len(database.models), "facts": len(database.facts), "scores": len(database.results), "problems": [],
            "conflicts": [asdict(conflict) for conflict in database.conflicts()], "missing": database.missing(),
        }  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Print the counts, the conflicts and what is missing."""
        print(f"{result['models']} models, {result['facts']} facts, {result['scores']} scores: no problem")
        print(f"{len(result['conflicts'])} conflicts")
        print_table([{name: conflict[name] for name in ("model", "item", "kept", "other")} for conflict in result["conflicts"]])
        print_table([{"feature": name, "missing": f"{share:.0%}"} for name, share in result["missing"].items() if share])
