"""Adding to a database folder: read, merged and exchanged under one lock, so that two imports at once cannot lose either."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmcore.record import published
from scaling_meta.database import Database
from scaling_meta.files import check_place
from scaling_meta.records import Conflict


@dataclass(frozen=True)
class Added:
    """The database after an import, how many models, facts and scores it has that it had not, and how many values changed."""

    database: Database
    new: dict[str, int]
    changed: int


def add(
    other: Database, into: Path, *, prefer: Literal["old", "new"] = "old", empty: bool = False
) -> tuple[Added, list[Conflict]]:
    """Merge `other` into the folder `into`, and tell where they disagree (see `Database.merge`).

    A folder that does not exist starts with the shipped models, or with none if `empty`. It is exchanged whole: a killed run leaves the old
    one. Raises: `UserError`, with nothing written, if the result has a problem or the folder holds anything but a database.
    """
    check_place(into)
    with published(into, overwrite=True) as folder:
        old = Database.open(into) if into.exists() and any(into.iterdir()) else Database() if empty else Database.shipped()
        merged, conflicts = old.merge(other, prefer)
        merged.write_files(folder)
    new = {
        "models": len(merged.models) - len(old.models),
        "facts": len(merged.facts) - len(old.facts),
        "scores": len(merged.results) - len(old.results),
    }
    before, after = ({**database.facts, **database.results} for database in (old, merged))
    changed = sum(after[key].value != record.value for key, record in before.items())
    return Added(merged, new, changed), conflicts
