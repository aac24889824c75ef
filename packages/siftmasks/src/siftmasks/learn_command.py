"""The commands `siftmasks learn` and `siftmasks learn-all`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lmcore.errors import UserError
from siftmasks.store_commands import BaseCommand, ModelCommand, usable


@dataclass(frozen=True, kw_only=True)
class Learn(ModelCommand):
    """Fine-tune a task from the base model and add it to the store; or add one that was trained elsewhere (policy archive)."""

    task: tyro.conf.Positional[str]
    """Id of the task: any text."""
    data: Path | None = None
    """JSONL file of prompt and completion, or of text and label; or the file or folder of many tasks that `learn-all` takes."""
    checkpoint: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Folder, file or Hub id of a fine-tune of the base, instead of data."""

    def run(self) -> dict[str, Any]:
        """Add the task; return the digest and how well the task vector fitted the store's grid."""
        if (self.data is None) == (self.checkpoint is None):
            raise UserError("learn takes either --data or --from")
        store = self.opened()
        store.snapshot().check_new([self.task])
        if self.data is None:
            imported = store.learn_from(self.task, self.checkpoint or "")
            fit: dict[str, Any] = {"saturated": imported.saturated, "lost": imported.lost}
        else:
            from siftmasks.task_data import open_data

            examples = open_data(self.data, self.task).read([self.task])[self.task]
            trainee = self.trainee(store)
            saturated = store.learn(self.task, examples, model=trainee.model, loss=trainee.loss)
            fit = {"examples": len(examples), "saturated": saturated}
        return {"task": self.task, **fit, "tasks": len(store.tasks), "digest": store.digest()}


@dataclass(frozen=True, kw_only=True)
class LearnAll(BaseCommand):
    """Learn all tasks of a folder or file that are not in the store yet. The same command goes on after a crash, a kill or Ctrl-C.

    Tasks may be trained by several processes of this machine (not under torchrun), on the CPU or on GPUs; the digest of the store is the
    same as from one process. Tasks whose data cannot be used are named at the end, with exit status 2; the others are learned.
    """

    data: Path
    """Folder of TASK.jsonl files, or one JSONL file with the key "task" in every line."""
    processes: int | None = None
    """Tasks to train at a time; by default one per device."""
    devices: tuple[str, ...] = ()
    """Devices that the processes take turns on, e.g. cuda:0 cuda:1; by default the GPU if there is one."""
    publish_seconds: float = 30.0
    """Add what is trained to the store this often, or more rarely where the ledger is large; a kill loses what is not added yet."""

    def run(self) -> dict[str, Any]:
        """Learn; return what was learned and skipped, and the digest."""
        from siftmasks.queue import learn_all
        from siftmasks.task_data import open_data

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("learn-all shares the tasks out itself: start it without torchrun, with --processes or --devices")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes {self.processes}: choose 1 or more")
        store, data = self.opened(), open_data(self.data)
        devices = [usable(device) for device in self.devices or (None,)]
        result = learn_all(
            store, data, processes=self.processes or len(devices), devices=devices, publish_seconds=self.publish_seconds,
            progress=True,
        )  # fmt: skip
        if failed := result.pop("failed"):
            reasons = "; ".join(f"{task}: {why}" for task, why in failed.items())
            raise UserError(f"{len(failed)} of {len(data.held)} tasks were not learned, all others are in the store. {reasons}")
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print counts and digest."""
        beyond = sum(count > 0 for count in result["learned"].values())
        print(f"{len(result['learned'])} tasks learned, {len(result['skipped'])} were there, {result['tasks']} in the store")
        if beyond:
            print(f"{beyond} of them moved weights beyond the grid: a store with more --headroom has room for them")
        print(f"digest {result['digest']}")


LearnAll.__name__ = "learn-all"  # the name of the command
