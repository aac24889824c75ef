"""The commands `scaling-meta import` and `scaling-meta export`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from lmcore.cli import Command
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Add models, facts and scores to a database folder; doing it twice changes nothing more.

    SOURCE is a model folder of Hugging Face (config.json and safetensors), a file or folder of results of lm-evaluation-harness, a CSV, the
    export of the authors' database, the table of ObsScaling, or another database.
    """

    source: tyro.conf.Positional[Path]
    """File or folder to read."""
    into: Path
    """Folder of the database; where there is none, it starts with the shipped models."""
    kind: Literal["hf", "lm-eval", "paper", "obsscaling", "database", "csv"] | None = None
    """What SOURCE is; told from what it looks like by default."""
    name: str | None = None
    """Name of the model, where SOURCE has one that is named otherwise or not at all."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """FIELD=VALUE of the one model in SOURCE: --set tokens_billions=2000 --set share_code=8 --set family=Qwen; =unknown leaves it out."""
    map: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """COLUMN=FIELD of a plain CSV, COLUMN=- to leave it out; once for each column."""
    cite: str | None = None
    """Where the values of --set or of a plain CSV are from; without it they count as unverified."""
    prefer: Literal["old", "new"] = "old"
    """Which value stays where SOURCE and the database disagree."""
    empty: bool = False
    """Start a new folder without the shipped models."""

    def run(self) -> dict[str, Any]:
        """Import, and return what was added, what was left out and where sources disagree."""
        from scaling_meta.adding import add
        from scaling_meta.importers import Options, load

        given, columns = _pairs("--set", self.set), _pairs("--map", self.map)
        imported = load(self.source, self.kind, Options(name=self.name, given=given, columns=columns, cite=self.cite))
        added, conflicts = add(imported.database, self.into, prefer=self.prefer, empty=self.empty)
        alone = [name for name in imported.database.models if not added.database.models[name].family]
        return {
            "into": str(self.into), "models": len(imported.database.models), "facts": len(imported.database.facts),
            "scores": len(imported.database.results), "new": added.new, "changed": added.changed, "without_family": alone,
            "left_out": list(imported.left_out), "conflicts": [asdict(conflict) for conflict in conflicts],
        }  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Print the counts, what was left out and the conflicts."""
        new = result["new"]
        print(f"read {result['models']} models, {result['facts']} facts, {result['scores']} scores into {result['into']}")
        print(f"new: {new['models']} models, {new['facts']} facts, {new['scores']} scores; changed: {result['changed']}")
        for name in result["without_family"]:
            print(f"{name} has no family and counts as one of its own: --set family=...")
        for reason in result["left_out"]:
            print(f"left out: {reason}")
        for conflict in result["conflicts"]:
            kept, other = (f"{conflict[part]} ({conflict[f'{part}_source']})" for part in ("kept", "other"))
            print(f"conflict: {conflict['model']} {conflict['item']}: kept {kept}, not {other}")


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a database as one wide table, one row per model: .csv or .parquet (with the extra `parquet`)."""

    out: tyro.conf.Positional[Path]
    """File to write."""
    database: Path | None = None
    """Folder of the database; the shipped one by default."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self) -> dict[str, Any]:
        """Write the file, and return its size."""
        from scaling_meta.database import Database

        if self.out.exists() and not self.overwrite:
            raise UserError(f"{self.out} exists: pass --overwrite or choose another file")
        database = Database.open(self.database) if self.database else Database.shipped()
        database.export(self.out)
        return {"out": str(self.out), "models": len(database.models), "bytes": self.out.stat().st_size}


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs; the last `=` of a column's name is not its own."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=") if option == "--map" else text.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{option} {text}: write NAME=VALUE")
        if name in pairs:
            raise UserError(f"{option} {name} is there twice")
        pairs[name] = value
    return pairs
