"""Take tasks, or examples of a task, out of a store as if they had never been in it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lmcore.errors import UserError
from siftmasks.commitments import RederivationMismatch
from siftmasks.next_version import NextVersion, next_version
from siftmasks.snapshot import Snapshot
from siftmasks.training import Training


def forget(path: Path, tasks: Collection[str], training: Training) -> tuple[Snapshot, set[str]]:
    """Remove tasks; returns the version without them and the methods used. All commitments are compared before anything is subtracted."""
    with next_version(path) as version:
        methods = _remove(version, tasks, training)
    return version.standing, methods


def forget_examples(path: Path, task: str, ids: Collection[str], training: Training) -> tuple[Snapshot, set[str]]:
    """Replace a task by its retrain on the examples that remain, in one version. Returns: as `forget`."""
    examples = training.examples[task]
    remaining = [example for example in examples if example.id not in {*ids}]
    with next_version(path) as version:
        version.old.require([task])
        if missing := sorted({*ids} - {example.id for example in examples}):
            raise UserError(f"task {task!r} has no example {missing[0]!r} in the data given ({len(missing)} such ids)")
        if not remaining or len(remaining) == len(examples):
            kept = f"{len(remaining)} of {len(examples)} examples of task {task!r} would remain"
            raise UserError(f"{kept}: forget the task, or name examples")
        archived = version.config.policy == "archive"
        methods = _remove(version, [task], replace(training, examples={}) if archived else training)
        for name, vector in replace(training, examples={task: remaining}).vectors(version.config, [task]):
            version.add(name, vector)
    return version.standing, methods


def rebuild(path: Path, forgetting: Collection[str], training: Training) -> tuple[Snapshot, set[str]]:
    """Make the ledgers that hold the tasks anew from those that remain: by their archive where there is one, else from their data.

    Returns: as `forget`.
    """
    with next_version(path) as version:
        config = version.config
        remaining = version.old.remaining(forgetting)
        archived = [task for task in remaining if config.policy == "archive" and task not in training.examples]
        derived = training.vectors(config, [task for task in remaining if task not in archived])
        for group in version.old.groups(forgetting):
            version.begin_anew(group, archived)
        found = {task: version.archived(task) for task in archived}
        _check_equal(version, {task: differing for task, (_, differing) in found.items()})
        for task, (recorded, _) in found.items():
            version.contribute(task, recorded)
        for task, vector in derived:
            version.add(task, vector)
    return version.standing, {"rebuild"}


def _remove(version: NextVersion, tasks: Collection[str], training: Training) -> set[str]:
    version.old.require(tasks)
    derived = [task for task in tasks if version.config.policy != "archive" or task in training.examples]
    vectors = training.vectors(version.config, derived)
    found = {task: version.archived(task) for task in tasks if task not in derived}
    for task, vector in vectors:
        found[task] = version.rederived(task, vector)
    _check_equal(version, {task: differing for task, (_, differing) in found.items()})
    for task, (recorded, _) in found.items():
        version.remove(task, recorded)
    return ({"rederive"} if derived else set()) | ({"archive"} if len(derived) < len(found) else set())


def _check_equal(version: NextVersion, differing: dict[str, list[str]]) -> None:
    """Raise `RederivationMismatch` for the tasks that have differing tensors."""
    wrong = {task: tensors for task, tensors in differing.items() if tensors}
    if not wrong:
        return
    task, tensors = next(iter(wrong.items()))
    config = version.config
    peers = len(version.old.remaining([task]))
    raise RederivationMismatch(
        f"task {task!r} is not the one that was learned: it differs in {len(tensors)} of {len(config.tensors)} tensors, the first "
        f"{tensors[0]}{f', and so do {len(wrong) - 1} other tasks' if len(wrong) > 1 else ''}. Since then: "
        f"{version.old.commitment(task).changes()}. Nothing was changed. Give the data it was learned from on the machine it was learned "
        f"on, or rebuild from the data of the {peers} other tasks of its ledger",
        wrong,
    )
