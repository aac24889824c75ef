"""The commands `siftmasks forget` and `siftmasks verify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lmcore.errors import UserError
from siftmasks.store_commands import ModelCommand

if TYPE_CHECKING:
    from siftmasks.examples import Example
    from siftmasks.store import Store


@dataclass(frozen=True, kw_only=True)
class Forget(ModelCommand):
    """Remove tasks, or examples of a task, exactly: the store is then bit for bit the one that never learned them.

    The data they were learned from are needed once more, to derive what is subtracted and prove that it is what was added; under the policy
    archive they are not. Where they are gone, or give something else on this machine, --rebuild makes the ledger anew from the data of
    the other tasks; without a task, it makes all ledgers anew, which mends damaged ones.
    """

    tasks: tyro.conf.Positional[tuple[str, ...]]
    """Ids of the tasks."""
    data: Path | None = None
    """Their data, as `learn` or `learn-all` took them; with --rebuild, those of the remaining tasks. Data of other tasks are not read."""
    examples: tuple[str, ...] = ()
    """Ids of examples to forget, of one task whose other examples stay; --data has all of its examples."""
    rebuild: bool = False
    """Forget without the tasks' own data."""
    certificate: Path | None = None
    """File for the certificate, outside the store."""
    note: str | None = None
    """Text for the certificate, such as the number of a request."""

    def run(self) -> dict[str, Any]:
        """Forget; return the digest and the certificate, if one was written."""
        from siftmasks.commitments import RederivationMismatch

        store = self.opened()
        if self.tasks or not self.rebuild:
            store.snapshot().require(self.tasks)
        tasks = [*dict.fromkeys(self.tasks)]
        proof: dict[str, Any] = {"certificate": self.certificate, "note": self.note}
        if self.examples:
            if self.rebuild or len(tasks) != 1 or self.data is None:
                raise UserError("--examples takes one task and its --data, and no --rebuild")
            data, task = self._read(store, tasks), tasks[0]
            written = store.forget_without(task, self.examples, data[task], **self._model(store, data), **proof)
        elif self.rebuild:
            data = self._read(store, store.remaining(tasks))
            written = store.rebuild(tasks, data, **self._model(store, data), **proof)
        else:
            data = self._read(store, tasks)
            try:
                written = store.forget(tasks, data, **self._model(store, data), **proof)
            except RederivationMismatch as error:
                raise UserError(f"{error}: forget --rebuild --data THEIR_DATA") from None
        return {"forgotten": len(tasks), "tasks": len(store.tasks), "digest": store.digest(), "certificate": written}

    def show(self, result: dict[str, Any]) -> None:
        """Print digest and where the certificate is."""
        what = f"{len({*self.examples})} examples of 1 task" if self.examples else f"{result['forgotten']} tasks"
        print(f"{what} forgotten, {result['tasks']} tasks in the store")
        if self.certificate:
            print(f"certificate {self.certificate}")
        print(f"digest {result['digest']}")

    def _read(self, store: "Store", tasks: Sequence[str]) -> "dict[str, Sequence[Example]]":
        """The examples of these tasks; under the policy archive, of those that there are data of."""
        from siftmasks.task_data import open_data

        archived = store.config.policy == "archive" and not self.examples
        if self.data is None:
            if tasks and not archived:
                raise UserError(
                    f"the policy {store.config.policy} needs the data of {len(tasks)} tasks, {tasks[0]!r} first: give --data"
                )
            return {}
        data = open_data(self.data, tasks[0] if len(tasks) == 1 else None)
        return data.read([task for task in tasks if task in data.held or not archived])

    def _model(self, store: "Store", data: "dict[str, Sequence[Example]]") -> dict[str, Any]:
        """Model and loss, where there are data to train on."""
        if not data:
            return {}
        trainee = self.trainee(store)
        return {"model": trainee.model, "loss": trainee.loss}


@dataclass(frozen=True, kw_only=True)
class Verify(ModelCommand):
    """Learn all tasks again into an empty store and compare every byte: proof that the store holds these tasks and nothing else."""

    data: Path | None = None
    """Folder or file with the data of all tasks of the store and of no others, as `learn-all` takes them."""
    checkpoints: Path | None = None
    """Folder of folders, one per task that was learned with --from, named like the task."""

    def run(self) -> dict[str, Any]:
        """Compare; a difference is an error that names the files."""
        from siftmasks.task_data import open_data

        store = self.opened()
        only = store.tasks[0] if len(store.tasks) == 1 else None
        data = open_data(self.data, only) if self.data else None
        examples = data.read(data.tasks) if data else {}
        if self.checkpoints and not self.checkpoints.is_dir():
            raise UserError(f"{self.checkpoints} is no folder")
        checkpoints = {path.name: path for path in sorted(self.checkpoints.iterdir())} if self.checkpoints else {}
        trainee = self.trainee(store) if examples else None
        how: dict[str, Any] = {"model": trainee.model, "loss": trainee.loss} if trainee else {}
        found = store.verify(examples, checkpoints=checkpoints, **how)
        if not found.equal:
            raise UserError(
                f"{store.path} is not what these data give on this machine: {len(found.different)} files differ, {found.different[0]} first"
            )
        return {"equal": True, "digest": found.digest, "tasks": len(store.tasks)}

    def show(self, result: dict[str, Any]) -> None:
        """Print what was compared."""
        print(f"{self.store}: equal to a rebuild from the data of its {result['tasks']} tasks")
        print(f"digest {result['digest']}")
