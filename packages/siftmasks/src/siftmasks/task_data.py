"""The data of tasks as users keep them: a folder with a file per task, or one file whose lines name their tasks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmcore.errors import UserError
from siftmasks.examples import Example, Line, examples_of, named, read_examples, read_lines

_ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class TaskData:
    """The data of each task that `source` holds: its file, read when asked for, or its examples."""

    source: Path
    held: Mapping[str, Path | Sequence[Example]]

    @property
    def tasks(self) -> list[str]:
        """The tasks, sorted."""
        return sorted(self.held)

    def require(self, tasks: Iterable[str]) -> None:
        """Raise `UserError` if there are no data of one of these tasks."""
        for task in tasks:
            if task not in self.held:
                named = ", ".join(map(repr, self.tasks[:3])) + (", ..." if len(self.held) > 3 else "")
                raise UserError(f"{self.source} has no data of task {task!r}: it has those of {len(self.held)} tasks, {named}")

    def read(self, tasks: Iterable[str]) -> dict[str, Sequence[Example]]:
        """Return the examples of these tasks. Raises: `UserError` as `require` and `examples.read_examples` do."""
        tasks = [*tasks]
        self.require(tasks)
        return {task: examples_in(self.held[task]) for task in tasks}


def open_data(path: Path, only: str | None = None) -> TaskData:
    """Find the tasks of a folder of TASK.jsonl or TASK.jsonl.gz files, or of one such file whose lines have the key `task`.

    Other files of the folder are left alone; the files of tasks are read when they are asked for, a single file is read at once. `only`
    names the task that a file without the key belongs to. Lines are as for `examples.read_examples`, with ids unique within each task; a
    task may be a whole number there, as an id may.

    Raises: `UserError` naming the path if it holds no task, or two files of one; naming file and line for what cannot be read or names
    no task.
    """
    if not path.is_dir():
        return TaskData(path, _tasks_of_file(path, only))
    held: dict[str, Path | Sequence[Example]] = {}
    for file in sorted(path.iterdir()):
        ending = next((ending for ending in _ENDINGS if file.name.endswith(ending)), None)
        if ending is None or not file.is_file():
            continue
        task = file.name.removesuffix(ending)
        if task in held:
            raise UserError(f"{path} has two files of task {task!r}: {task}.jsonl and {task}.jsonl.gz: keep one")
        held[task] = file
    if not held:
        raise UserError(f"{path} holds no TASK.jsonl file")
    return TaskData(path, held)


def examples_in(held: Path | Sequence[Example]) -> Sequence[Example]:
    """Return what a `TaskData` holds of a task, read if it is a file."""
    return read_examples(held) if isinstance(held, Path) else held


def _tasks_of_file(path: Path, only: str | None) -> dict[str, Path | Sequence[Example]]:
    lines: dict[str | None, list[Line]] = {}
    for line in read_lines(path):
        lines.setdefault(named(f"{path}, line {line.number}", "task", line.task), []).append(line)
    if not lines:
        raise UserError(f"{path} holds no example")
    if None in lines and (only is None or len(lines) > 1):
        raise UserError(
            f"{path}, line {lines[None][0].number}: names no task: every line needs the key task, or none where one task is asked for"
        )
    return {task or only or "": examples_of(path, own) for task, own in lines.items()}
