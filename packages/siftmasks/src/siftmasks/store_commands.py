"""The commands that make, name, check and copy a store; and what all commands share that open one."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lmcore.cli import Command
from lmcore.errors import UserError

if TYPE_CHECKING:
    from siftmasks.models import Trainee
    from siftmasks.store import Store


@dataclass(frozen=True, kw_only=True)
class StoreCommand(Command):
    """A command on a store that exists."""

    store: tyro.conf.Positional[Path]
    """Folder of the store."""
    seed: int = 0
    """Changes nothing: all that is random follows from the seed that `init` fixed."""

    def opened(self) -> "Store":
        """The store. Raises: `UserError` as `Store.open` does."""
        from siftmasks.store import Store

        return Store.open(self.store)


@dataclass(frozen=True, kw_only=True)
class BaseCommand(StoreCommand):
    """A command that needs the base model."""

    base: str | None = None
    """Folder, file or Hub id of the base model, if it has moved since `init`."""

    def opened(self) -> "Store":
        """The store; its base is looked for, and its hash compared, when it is needed."""
        from siftmasks.store import Store

        store = Store.open(self.store, base=self.base)
        fixed = store.config.settings.seed
        if self.seed not in (0, fixed):
            warnings.warn(f"--seed {self.seed} changes nothing: `init` fixed the seed {fixed}", stacklevel=2)
        return store


@dataclass(frozen=True, kw_only=True)
class ModelCommand(BaseCommand):
    """A command that runs the model."""

    device: str | None = None
    """Where to run, e.g. cpu or cuda:1; by default the GPU if there is one. A task is derived again where it was learned."""

    def trainee(self, store: "Store") -> "Trainee":
        """The base model with its tokenizer, on the device. Raises: `UserError` as `load_trainee` and `usable` do."""
        device = usable(self.device)
        from siftmasks.models import load_trainee

        trainee = load_trainee(store.base().path, store.config.settings)
        trainee.model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its type
        return trainee


def usable(device: str | None) -> str:
    """Return the device, or the default one. Raises: `UserError` if it cannot be used here."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when a GPU is first used: see `deterministic`
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise UserError(f"the device {device} cannot be used here: {str(error).partition('. ')[0]}") from None
    return device


@dataclass(frozen=True, kw_only=True)
class Init(Command):
    """Make an empty store over a base model. All options are fixed for its life: together with the tasks they decide every byte."""

    store: tyro.conf.Positional[Path]
    """Folder of the store, which must not exist."""
    seed: int = 0
    """Seed of the sign vector, and of the batches and dropout of every task."""
    base: str
    """Folder, file or Hub id of the base model, or smollm2, the packaged one."""
    max_tasks: int = 255
    """Most tasks the store may hold at a time; with --bits it decides the bytes per weight of the ledger."""
    policy: Literal["rederive", "archive", "groups"] = "rederive"
    """How a task is forgotten whose data no longer give what was learned: rederive trains all others again, groups those of its group,
    archive keeps every task's magnitudes and needs no data at all."""
    groups: int = 1
    """Ledgers of the policy groups, 2 or more."""
    mode: Literal["sift", "signs"] = "sift"
    """sift: the paper's sign constraint. signs: no constraint, each task keeps its own signs."""
    learning_rate: float = 1e-4
    """Adam's step size."""
    steps: int = 20
    """Optimizer steps per task."""
    batch_size: int | None = None
    """Examples per step; by default all of the task's."""
    bits: int = 8
    """Bits of a magnitude, 1 to 16."""
    headroom: float = 2.0
    """Magnitudes up to headroom x learning rate x steps have room."""
    density: float | None = None
    """Keep this share of each tensor, its largest magnitudes; by default all (mode sift only)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions: tensors whose name has a match are not trained, besides embeddings and head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights while a task is trained; task vectors are float32 in any case."""
    threads: int = 1
    """CPU threads while a task is trained: another number may give other bits."""
    max_length: int = 512
    """Tokens of an example; a longer prompt loses its beginning."""

    def run(self) -> dict[str, Any]:
        """Make the store; return its digest and what it and each task will take on the disk."""
        from siftmasks.settings import SiftSettings
        from siftmasks.store import Store
        from siftmasks.store_report import storage

        names = ("learning_rate", "steps", "batch_size", "bits", "headroom", "seed", "mode", "density", "dtype", "threads")
        settings = SiftSettings(**{name: getattr(self, name) for name in names}, max_length=self.max_length, freeze=self.freeze)
        store = Store.init(
            self.store, self.base, settings=settings, max_tasks=self.max_tasks, policy=self.policy, groups=self.groups
        )
        planned = storage(store.config)
        return {"store": str(store.path), "digest": store.digest(), "tensors": len(store.config.tensors), **planned}

    def show(self, result: dict[str, Any]) -> None:
        """Print the store and its sizes."""
        print(f"{result['store']}: {result['weights']:,} weights in {result['tensors']} tensors are trained per task")
        print(f"ledger {result['ledger_bytes']:,} bytes, each task {result['bytes_per_task']:,} bytes")
        print(f"digest {result['digest']}")


@dataclass(frozen=True, kw_only=True)
class Digest(StoreCommand):
    """Print the digest of a store: a hash of its configuration, ledger and masks, equal for equal live tasks in whatever order."""

    def run(self) -> dict[str, Any]:
        """Return the digest."""
        return {"digest": self.opened().digest()}

    def show(self, result: dict[str, Any]) -> None:
        """Print it alone."""
        print(result["digest"])


@dataclass(frozen=True, kw_only=True)
class Tasks(StoreCommand):
    """List the tasks of a store."""

    def run(self) -> dict[str, Any]:
        """Return their ids, sorted, and how many there may be."""
        store = self.opened()
        return {"tasks": store.tasks, "max_tasks": store.config.max_tasks}

    def show(self, result: dict[str, Any]) -> None:
        """Print one id per line, as a JSON string if it would not be one line or not be seen."""
        from siftmasks.snapshot import in_one_line

        for task in result["tasks"]:
            print(in_one_line(task))


@dataclass(frozen=True, kw_only=True)
class Check(StoreCommand):
    """Hash every file of a store again and compare: what is damaged, missing or does not belong there is named."""

    def run(self) -> dict[str, Any]:
        """Return digest and number of tasks; damage is an error."""
        store = self.opened()
        store.check()
        return {"sound": True, "digest": store.digest(), "tasks": len(store.tasks)}


@dataclass(frozen=True, kw_only=True)
class Certify(StoreCommand):
    """Write the certificate of a store as it is now, as after a `forget` that was killed before it wrote its own."""

    certificate: Path
    """File to write, outside the store."""
    note: str | None = None
    """Text for the certificate, such as the number of a request."""

    def run(self) -> dict[str, Any]:
        """Write and return the certificate."""
        return self.opened().certify(self.certificate, note=self.note) or {}


@dataclass(frozen=True, kw_only=True)
class Backup(StoreCommand):
    """Copy a store, with commitments and archive, and check the copy. A backup keeps what is forgotten later."""

    out: Path
    """Folder of the copy, which must not exist."""

    def run(self) -> dict[str, Any]:
        """Copy, and return the digest."""
        store = self.opened()
        store.backup(self.out)
        return {"out": str(self.out), "digest": store.digest()}


@dataclass(frozen=True, kw_only=True)
class Restore(Command):
    """Make a store from a backup. Tasks that were forgotten since are in it again."""

    backup: tyro.conf.Positional[Path]
    """Folder that `siftmasks backup` wrote."""
    store: tyro.conf.Positional[Path]
    """Folder of the store, which must not exist."""
    seed: int = 0
    """Changes nothing: nothing here is random."""

    def run(self) -> dict[str, Any]:
        """Copy, and return digest and number of tasks."""
        from siftmasks.store import Store

        store = Store.restore(self.backup, self.store)
        return {"store": str(store.path), "digest": store.digest(), "tasks": len(store.tasks)}
