"""Add tasks to a store: those that `sift` trained, and those that were trained elsewhere."""

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.imported import Imported, ImportedTask, check_checkpoints
from siftmasks.next_version import NextVersion, next_version
from siftmasks.task_vector import TaskVector
from siftmasks.training import Training


def learn(path: Path, training: Training) -> dict[str, int]:
    """Train all tasks and add them in one version; returns how many coordinates of each lay beyond the grid."""
    with next_version(path) as version:
        version.check_new(training.examples)
        return _add(version, training.vectors(version.config, training.examples))


def add(path: Path, vectors: Iterable[tuple[str, TaskVector]]) -> dict[str, int]:
    """Add task vectors that `sift` made elsewhere, in one version; returns how many coordinates of each lay beyond the grid."""
    with next_version(path) as version:
        return _add(version, vectors)


def add_checkpoints(path: Path, base: Checkpoint, checkpoints: Mapping[str, str | os.PathLike[str]]) -> dict[str, Imported]:
    """Add the task vectors of checkpoints, in one version: base and ledger are read once, a tensor at a time."""
    with next_version(path) as version:
        if version.config.policy != "archive":
            raise UserError(
                f"{path} has the policy {version.config.policy}: what was trained elsewhere needs the policy archive"
            )
        version.check_new(checkpoints)
        tasks = contribute_checkpoints(version, base, checkpoints)
    return {task: one.report() for task, one in tasks.items()}


def contribute_checkpoints(
    version: NextVersion, base: Checkpoint, checkpoints: Mapping[str, str | os.PathLike[str]]
) -> dict[str, ImportedTask]:
    """Have the task vectors of checkpoints added when the ledger of `version` is written."""
    sources = {}
    for task, checkpoint in checkpoints.items():
        with Checkpoint.open(checkpoint) as source:
            sources[task] = source
    check_checkpoints(sources, base, version.config)
    base_tensor = lru_cache(maxsize=1)(base.tensor)  # all tasks add a tensor before the next one comes
    tasks = {
        task: ImportedTask(source, version.writer(task), version.config.settings, base_tensor)
        for task, source in sources.items()
    }
    for task, one in tasks.items():
        version.contribute(task, one)
    return tasks


def _add(version: NextVersion, vectors: Iterable[tuple[str, TaskVector]]) -> dict[str, int]:
    saturated = {}
    for task, vector in vectors:
        version.add(task, vector)
        saturated[task] = vector.saturated
    return saturated
