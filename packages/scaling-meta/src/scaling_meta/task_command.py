"""What the commands that fit to scores share: which models, which features, which benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmcore.cli import Command
from lmcore.errors import UserError
from scaling_meta import schema

if TYPE_CHECKING:
    import numpy as np

    from scaling_meta.table import Table

GROUPS = {"scaling": schema.SCALING, "architecture": schema.ARCHITECTURE, "data": schema.DATA, "generation": schema.GENERATION}


@dataclass(frozen=True, kw_only=True)
class TaskCommand(Command):
    """Options of a command that fits models to the scores in a database."""

    features: tuple[str, ...] = ("scaling", "architecture", "data")
    """Features by name, or groups: scaling, architecture, data, generation."""
    database: Path | None = None
    """Folder of the database; the shipped one by default."""

    def load(self, task: str) -> "tuple[Table, np.ndarray, np.ndarray]":
        """The models with a score on a benchmark: their design, scores and standard errors (NaN if unknown).

        Raises: `UserError` if the benchmark or a feature is unknown, or no model has a score.
        """
        import numpy as np

        from scaling_meta.tasks import open_database

        database = open_database(self.database)
        table = database.table(expand(self.features))
        scores = database.scores(task, table.models)
        known = ~np.isnan(scores.values)
        if not known.any():
            raise UserError(f"no model of the database has a score on {task}: import one first (scaling-meta import)")
        return table.rows(known), scores.values[known], scores.stderr[known]


def expand(features: Sequence[str]) -> tuple[str, ...]:
    """Groups replaced by their features, each feature once.

    >>> expand(["scaling", "share_code", "log_params"])
    ('log_params', 'log_tokens', 'share_code')
    """
    return tuple(dict.fromkeys(name for one in features for name in GROUPS.get(one, (one,))))
