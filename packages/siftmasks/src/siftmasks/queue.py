"""Learn many tasks: trained here or in processes of their own, and added to the store by one."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tqdm

from lmcore.errors import UserError
from siftmasks.config import StoreConfig
from siftmasks.task_data import TaskData, examples_in

if TYPE_CHECKING:
    from siftmasks.examples import Example
    from siftmasks.store import Store
    from siftmasks.task_vector import TaskVector

_MOST_WAITING = 2**32
"""Bytes of task vectors that may wait to be published."""


def learn_all(
    store: "Store", data: TaskData, *, processes: int = 1, devices: Sequence[str] = ("cpu",), publish_seconds: float = 30.0,
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Learn every task of `data` that is not in the store yet, in the order of their names.

    With one process the tasks are trained in this one, else in `processes` of this machine that take turns on `devices`. A task gives the
    same task vector whoever trains it (on devices of one kind: see `sift`), and only this process writes: the digest ends up the same.

    Trained tasks are published together, once `publish_seconds` have passed since the last time, or ten times what publishing took then
    (it writes the whole ledger anew), or 4 GiB of them wait; also at the end, after an error or Ctrl-C. After a SIGKILL the same call
    trains again what was not published. Whether a task that is in the store was learned from these data is not checked.

    Returns: `learned` (task -> coordinates beyond the grid), `skipped` (tasks that were in the store), `failed` (task -> why: data that
    cannot be read, a loss that is not finite, a process that was killed), `tasks` in the store and its `digest`.
    Raises: `UserError` if the store has no room for all tasks, before any is trained, or the model cannot be loaded.
    """
    snapshot = store.snapshot()
    config, live = snapshot.config, {*snapshot.tasks}
    skipped = [task for task in data.tasks if task in live]
    todo = [task for task in data.tasks if task not in live]
    snapshot.check_new(todo)
    places = [Place(store.base().path, config, devices[i % len(devices)]) for i in range(min(processes, len(todo)))]
    outcomes = (_in_processes if len(places) > 1 else _here)(places, data, todo)
    queue = _Publisher(store, publish_seconds)
    failed: dict[str, str] = {}
    bar = tqdm.tqdm(total=len(data.tasks), initial=len(skipped), desc="learn-all", unit="task", disable=not progress)
    with bar, queue, contextlib.closing(outcomes):
        for task, outcome in outcomes:
            if isinstance(outcome, UserError):
                failed[task] = str(outcome)
            else:
                queue.add(task, outcome)
            bar.update()
    return {
        "learned": dict(sorted(queue.published.items())),
        "skipped": skipped,
        "failed": dict(sorted(failed.items())),
        "tasks": len(store.tasks),
        "digest": store.digest(),
    }


@dataclass(frozen=True)
class Place:
    """Where tasks are trained: from which base model, under which configuration, and on which device, such as "cpu" or "cuda:1"."""

    base: Path
    config: StoreConfig
    device: str

    def trainer(self) -> "Callable[[str, Path | Sequence[Example]], TaskVector | UserError]":
        """Load the model; return what trains a task from what a `TaskData` holds of it. Raises: `UserError` if it is not the base."""
        import torch

        from lmcore.checkpoint import Checkpoint
        from siftmasks.base_model import check_model
        from siftmasks.models import load_trainee
        from siftmasks.sift import sift

        settings, names = self.config.settings, [*self.config.tensors]
        trainee = load_trainee(self.base, settings)
        with Checkpoint.open(self.base) as base:
            check_model(trainee.model, base, settings)
        model: torch.nn.Module = trainee.model
        model.to(self.device)

        def train(task: str, held: "Path | Sequence[Example]") -> "TaskVector | UserError":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # coordinates beyond the grid are counted instead
                    return sift(model, examples_in(held), settings, task=task, loss=trainee.loss, trainable=names)
            except UserError as error:
                return error

        return train


class _Publisher:
    """Task vectors that wait to be added to the store together."""

    def __init__(self, store: "Store", seconds: float):
        self.published: dict[str, int] = {}
        self._store, self._seconds, self._patience = store, seconds, seconds
        self._waiting: dict[str, TaskVector] = {}
        self._last = time.monotonic()

    def add(self, task: str, vector: "TaskVector") -> None:
        self._waiting[task] = vector
        held = sum(level.nbytes for one in self._waiting.values() for level in one.levels.values())
        if time.monotonic() - self._last >= self._patience or held > _MOST_WAITING:
            self._publish()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._publish()

    def _publish(self) -> None:
        """Add what waits and is not there yet: a publish that was interrupted is tried again at the end, and may have succeeded."""
        began, there = time.monotonic(), {*self._store.tasks} if self._waiting else set()
        vectors = {task: vector for task, vector in self._waiting.items() if task not in there}
        self.published |= {task: self._waiting[task].saturated for task in there & self._waiting.keys()}
        if vectors:
            self.published |= self._store._add(vectors.items())
        self._waiting.clear()
        self._last = time.monotonic()
        self._patience = max(self._seconds, 10 * (self._last - began))


def _here(places: "Sequence[Place]", data: TaskData, tasks: Sequence[str]) -> "Generator[tuple[str, TaskVector | UserError]]":
    """Train in this process; without a task there is no place."""
    for place in places:
        train = place.trainer()
        for task in tasks:
            yield task, train(task, data.held[task])


def _in_processes(
    places: "Sequence[Place]", data: TaskData, tasks: Sequence[str]
) -> "Generator[tuple[str, TaskVector | UserError]]":
    """Train in a process per place; one that dies costs the task it was at, and another takes its place."""
    todo = deque(tasks)
    workers = {worker.connection: worker for worker in map(_Worker, places)}
    try:
        while todo or any(worker.task is not None for worker in workers.values()):
            for connection in wait([*workers]):
                worker = workers[connection]  # type: ignore[index]
                task, outcome = worker.receive()
                if task is not None and outcome is not None:
                    yield task, outcome
                elif isinstance(outcome, UserError):
                    raise outcome
                if todo and worker.process.is_alive():
                    worker.train(todo[0], data.held[todo.popleft()])
                    continue
                worker.process.terminate()
                del workers[worker.connection]
                if todo:
                    replacement = _Worker(worker.place)
                    workers[replacement.connection] = replacement
    finally:
        for worker in workers.values():
            worker.process.terminate()


class _Worker:
    """A process that trains, seen from the one that started it: it loads the model, says so, and then trains what it is given."""

    def __init__(self, place: Place):
        context = multiprocessing.get_context("spawn")  # fork would copy locks and GPUs in any state
        self.place = place
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(place, theirs), daemon=True)
        self.process.start()
        theirs.close()  # with the process's own end gone too, its death is the end of what can be read
        self.task: str | None = None

    def train(self, task: str, held: "Path | Sequence[Example]") -> None:
        """Hand over the next task."""
        self.task = task
        with contextlib.suppress(OSError):  # it has died: `receive` will tell
            self.connection.send((task, held))

    def receive(self) -> "tuple[str | None, TaskVector | UserError | None]":
        """Return the task and its outcome, or (None, None) once the model is loaded, or (None, why it could not be)."""
        try:
            reply = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            cause = (
                f"was killed by signal {-code}: is there memory enough?"
                if code < 0
                else f"ended with exit status {code}: see above"
            )
            return self.task, UserError(f"the process that {'trained it' if self.task else 'loaded the model'} {cause}")
        return self.task, _unpacked(*reply) if isinstance(reply, tuple) else reply


def _work(place: Place, connection: Connection) -> None:
    """What a process does until it is ended, at the latest with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    end_with_parent()
    tqdm.tqdm.set_lock(threading.RLock())  # the lock that it would make outlives a process that is terminated
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        train = place.trainer()
    except UserError as error:
        connection.send(error)
        return
    connection.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            outcome = train(*connection.recv())
            connection.send(outcome if isinstance(outcome, UserError) else _packed(outcome))


def end_with_parent() -> None:
    """Have this process end as soon as the one that started it has ended, however that was."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _packed(vector: "TaskVector") -> tuple[Any, ...]:
    """As arrays, which travel as bytes: tensors would be shared, with an open file for each."""
    levels = {name: tensor.numpy() for name, tensor in vector.levels.items()}
    signs = None if vector.signs is None else {name: tensor.numpy() for name, tensor in vector.signs.items()}
    return levels, signs, vector.saturated


def _unpacked(levels: dict[str, Any], signs: dict[str, Any] | None, saturated: int) -> "TaskVector":
    import torch

    from siftmasks.task_vector import TaskVector

    tensors = {name: torch.from_numpy(array) for name, array in levels.items()}
    return TaskVector(tensors, signs and {name: torch.from_numpy(array) for name, array in signs.items()}, saturated)
