"""The next version of a store, built beside the one that stands: what changes is written, the rest is linked."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

import numba
import numpy as np
import torch
from torch import Tensor

from lmcore.errors import UserError
from lmcore.record import published
from siftmasks.bits import pack_bits
from siftmasks.canonical import TensorFile, link, quoted, room_for, write_hashed
from siftmasks.commitments import Commitment, here
from siftmasks.exclusive import check_cleared, locked
from siftmasks.ops.ledger_add import ledger_add_levels, ledger_subtract
from siftmasks.recorded import RecordedTask, TaskWriter
from siftmasks.snapshot import BASE, MANIFEST, Manifest, Snapshot, archive_file, ledger_file, mask_file, sidecar_file
from siftmasks.task_vector import TaskVector

_THREADS = 8
"""At most: each holds a tensor, and beyond them all would wait for the ledger, to which one adds at a time."""


@runtime_checkable
class Contribution(Protocol):
    """What a task adds to the ledger."""

    def levels(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The levels of one tensor and, in mode "signs", its packed signs. Called once per tensor, in the order of their names."""


@contextmanager
def next_version(path: Path) -> Iterator["NextVersion"]:
    """Give the next version to change; when the block ends without an error, it takes the store's place in one step.

    Holds the store's lock. A process that is killed at any moment leaves the old version or the new one; what it leaves beside them is
    cleared by whoever opens the store next. Raises: `UserError` if another process writes, or the disk is full.
    """
    with locked(path):
        with room_for(path), published(path, overwrite=True) as folder:
            version = NextVersion(Snapshot(path), folder)
            yield version
            version.finish()
        check_cleared(path)
        version.standing = Snapshot(path)


class NextVersion:
    """Collects what changes; `finish` writes it.

    Memory: one tensor of the ledger, and of one task per thread, whatever the number of tasks.
    """

    def __init__(self, old: Snapshot, folder: Path):
        self.old, self.config, self._folder = old, old.config, folder
        self.standing = old
        """The version in the store's place: `old`, and after `next_version` this one, whatever other processes have published since."""
        self._spool = folder.with_name(f"{folder.name}.spool")
        self._writers: dict[str, TaskWriter] = {}
        self._added: dict[str, Contribution] = {}
        self._removed: dict[str, RecordedTask] = {}
        self._left_out: set[str] = set()
        self._keys: dict[str, bytes] = {}
        self._anew: set[int] = set()

    def check_new(self, tasks: Collection[str]) -> None:
        """Raise `UserError` if there is no task, one that is in the store already, or more than it has room for."""
        if not tasks:
            raise UserError("no task is named")
        self.old.check_new(tasks, {*self.old.tasks} - self._left_out | {*self._writers})

    def add(self, task: str, vector: TaskVector) -> None:
        """Add a task. Raises: as `check_new`."""
        writer = self.writer(task)
        self._write(writer, vector)
        self.contribute(task, writer.recorded())

    def writer(self, task: str) -> TaskWriter:
        """Begin to write the files of a new task. Raises: as `check_new`."""
        self.check_new([task])
        self._keys[task] = Commitment.new_key()
        levels = self._folder / archive_file(task) if self.config.policy == "archive" else self._spool / "new" / quoted(task)
        self._writers[task] = TaskWriter(self.config, self._keys[task], levels, self._folder / mask_file(task))
        return self._writers[task]

    def contribute(self, task: str, contribution: Contribution) -> None:
        """Have `contribution` add a task's levels when the ledger is written."""
        self._added[task] = contribution

    def rederived(self, task: str, vector: TaskVector) -> tuple[RecordedTask, list[str]]:
        """Set a task vector aside for `remove`; also returns the tensors in which it is not the one that was learned."""
        commitment = self.old.commitment(task)
        writer = TaskWriter(
            self.config, commitment.key, self._spool / "levels" / quoted(task), self._spool / "bits" / quoted(task)
        )
        self._write(writer, vector)
        return writer.recorded(), commitment.mismatches(writer.commitments)

    def archived(self, task: str) -> tuple[RecordedTask, list[str]]:
        """The archived task vector, for `remove`; also returns the tensors in which it is not the one that was learned."""
        recorded = RecordedTask(self.config, self.old.path / archive_file(task), self.old.file(mask_file(task)))
        commitment = self.old.commitment(task)
        return recorded, commitment.mismatches(recorded.commitments(commitment.key))

    def remove(self, task: str, recorded: RecordedTask) -> None:
        """Subtract a task from the ledger and leave its files behind."""
        self._removed[task] = recorded
        self._left_out.add(task)

    def begin_anew(self, group: int, tasks: Collection[str] = ()) -> None:
        """Start the ledger of a group from nothing: its tasks are left out, but for those in `tasks`, which are to contribute again."""
        self._anew.add(group)
        self._left_out |= {task for task in self.old.tasks if self.config.group(task) == group} - {*tasks}

    def finish(self) -> Manifest:
        """Write everything; returns the manifest."""
        kept = [task for task in self.old.tasks if task not in self._left_out]
        carried = ["config.json", *(mask_file(task) for task in kept)]
        uncounted = [BASE, *(sidecar_file(task) for task in kept)]
        uncounted += [archive_file(task) for task in kept if self.config.policy == "archive"]
        files: dict[str, str] = {}
        counts: dict[str, int] = {}
        live = [*kept, *self._writers]
        changed = {self.config.group(task) for task in (*self._removed, *self._added)} | self._anew
        for group in sorted({self.config.group(task) for task in live} | changed):
            if group in changed:
                written = self._write_ledger(group, empty=all(self.config.group(task) != group for task in live))
                files |= written[0]
                counts |= written[1]
            else:
                carried += [ledger_file(part, group) for part in self.config.parts]
                counts[str(group)] = self.old.manifest.counts[str(group)]
        for file in (*carried, *uncounted):
            link(self.old.path / file, self._folder / file)  # unread: a damaged one still fails its digest when it is used
        files |= {file: self.old.manifest.files[file] for file in carried}
        for task, writer in self._writers.items():
            files[mask_file(task)] = writer.bits_digest()
            commitment = Commitment(self._keys[task], writer.commitments, here())
            write_hashed(self._folder / sidecar_file(task), commitment.to_bytes())
        manifest = Manifest(files, len(live), counts)
        write_hashed(self._folder / MANIFEST, manifest.to_bytes())
        return manifest

    def _write_ledger(self, group: int, *, empty: bool) -> tuple[dict[str, str], dict[str, int]]:
        """Write the ledger of a group, tensor by tensor, unless it must be empty; returns its files' digests and the sum of its counts."""
        shapes = {name: shape for name, (_, shape) in sorted(self.config.tensors.items())}
        removed = {task: one for task, one in self._removed.items() if self.config.group(task) == group}
        added = [one for task, one in self._added.items() if self.config.group(task) == group]
        writers: dict[str, TensorFile] = {}
        for part in () if empty else self.config.parts:
            tensors = {name: (self.config.dtypes[part], shape) for name, shape in shapes.items()}
            writers[part] = TensorFile(self._folder / ledger_file(part, group), tensors)
        counted = 0
        with _in_threads(len(added)) as mapped:
            for name in shapes:
                ledger = {part: self._start(part, name, group) for part in self.config.parts}
                for task, recorded in removed.items():
                    levels, signs = recorded.levels(name)
                    if below := ledger_subtract(levels, **ledger, signs=signs):
                        raise UserError(
                            f"{self.old.path}: {below} coordinates of {name} would fall below zero without {task!r}: rebuild"
                        )
                for _ in mapped(partial(_add, name, ledger, Lock()), added):
                    pass  # an error comes up here
                if empty and any(part.numpy().any() for part in ledger.values()):
                    raise UserError(f"{self.old.path}: something is left of {name} without any task: rebuild")
                for part, writer in writers.items():
                    writer.write(name, ledger[part].numpy())
                counted += int(ledger["count"].numpy().sum(dtype=np.uint64))
        digests = {ledger_file(part, group): writer.digest() for part, writer in writers.items()}
        return digests, {} if empty else {str(group): counted}

    def _start(self, part: str, name: str, group: int) -> Tensor:
        if group in self._anew:
            dtype, shape = self.config.dtypes[part], self.config.tensors[name][1]
            return torch.from_numpy(np.zeros(shape, f"uint{dtype[1:]}"))
        return self.old.ledger(part, name, group)

    def _write(self, writer: TaskWriter, vector: TaskVector) -> None:
        for name in sorted(self.config.tensors):
            levels = vector.levels[name]
            writer.write(name, levels, pack_bits(levels != 0) if vector.signs is None else vector.signs[name])


def _add(name: str, ledger: dict[str, Tensor], adding: Lock, contribution: Contribution) -> None:
    levels, signs = contribution.levels(name)
    with adding:  # in whatever order they come: integers add up to the same
        ledger_add_levels(levels, **ledger, signs=signs)


@contextmanager
def _in_threads(tasks: int) -> Iterator[Callable[..., Iterator[None]]]:
    """Give a `map` that works on several of up to `tasks` things at a time.

    One thing alone is left to the threads of the kernels: several threads that each start others would only wait for each other.
    """
    workers = min(tasks, torch.get_num_threads(), _THREADS)
    if workers < 2:
        yield map
        return
    with ThreadPoolExecutor(workers, initializer=numba.set_num_threads, initargs=(1,)) as pool:
        yield pool.map
