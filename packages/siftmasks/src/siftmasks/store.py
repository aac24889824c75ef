"""A store: one merged model of many tasks, each of which can be forgotten exactly."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.record import published
from siftmasks.canonical import room_for, write_hashed
from siftmasks.certificate import check_place, write_certificate
from siftmasks.config import Policy, StoreConfig
from siftmasks.exclusive import check_cleared, clear, locked
from siftmasks.settings import SiftSettings
from siftmasks.snapshot import BASE, MANIFEST, Manifest, Snapshot, base_to_bytes

if TYPE_CHECKING:
    import torch

    from siftmasks.imported import Imported
    from siftmasks.served import Scale
    from siftmasks.task_vector import TaskVector
    from siftmasks.training import Examples, Loss, Training
    from siftmasks.verification import Verification

Source = str | os.PathLike[str]


class Store:
    """A folder with the ledger (total N and count C of all task vectors), a bit file per task, and nothing of what was forgotten.

    Its canonical files (config, ledger, masks, manifest) are a function of configuration, base model and live tasks alone: not of the order
    of learning, of what was forgotten, or of the time; `digest()` is one hash over them. Beside them lie commitments, archived levels
    (policy "archive") and where the base was found.

    Every change is built beside the store and takes its place in one step: a process that is killed leaves the old version or the
    new one, and what else it leaves is cleared when the store is next opened. One process writes at a time, a second gets a `UserError`;
    readers see one version. Nothing is kept in memory but where the store and its base are.

    Policies say how a task is forgotten whose data no longer give the task vector that was learned (another machine, other
    libraries): "rederive" trains all other tasks again, "groups" only those of the same ledger, with `groups` ledgers on the disk;
    "archive" keeps the levels of every task (one or two bytes per weight) and never needs data.

    >>> from safetensors.torch import save_file
    >>> from siftmasks.examples import Example
    >>> folder, model = Path(tempfile.mkdtemp()), torch.nn.Linear(3, 1, bias=False)
    >>> save_file(model.state_dict(), folder / "base.safetensors")
    >>> distance = lambda model, batch: (model(torch.ones(3)) - batch[0].fields["y"]).square().sum()
    >>> data = {"alice": [Example("1", {"y": 5.0})], "bob": [Example("1", {"y": -5.0})]}
    >>> store, other = (Store.init(folder / name, folder / "base.safetensors", trainable=["weight"]) for name in ("store", "other"))
    >>> store.learn_many(data, model=model, loss=distance)
    {'alice': 0, 'bob': 0}
    >>> store.forget("bob", data, model=model, loss=distance)
    >>> other.learn("alice", data["alice"], model=model, loss=distance)
    0
    >>> store.tasks, store.digest() == other.digest()
    (['alice'], True)

    Source: SIFT-Masks, Kuo et al. 2025 (arXiv 2504.04626), whose float sum is here one of integers.
    """

    def __init__(self, path: Path, base: Source | None = None):
        self.path, self._source = path, base
        self._base: Checkpoint | None = None

    @classmethod
    def init(
        cls, path: Source, base: Source, *, settings: SiftSettings | None = None, max_tasks: int = 255,
        policy: Policy = "rederive", groups: int = 1, trainable: Sequence[str] | None = None,
    ) -> "Store":  # fmt: skip
        """Make an empty store over a base model: a folder, a file, a Hub id or the packaged "smollm2". All of this is fixed for its life.

        `max_tasks` decides the dtypes of the ledger, so that it cannot overflow. `trainable` None takes all weights but embeddings and
        head, as config.json of the base tells them.

        Raises: `UserError` if `path` exists, the base cannot be read or lacks a trainable tensor, or the options do not fit each other.
        """
        from siftmasks.base_model import base_sha256, open_base, trainable_tensors

        path, settings = Path(path).resolve(), settings or SiftSettings()
        if path.exists():
            raise UserError(f"{path} exists: choose another folder for the store")
        with open_base(os.fspath(base)) as checkpoint:
            tensors = trainable_tensors(checkpoint, settings, trainable)
            config = StoreConfig.new(settings, max_tasks, policy, groups, tensors, base_sha256(checkpoint))
            found = base_to_bytes(str(checkpoint.path.resolve()))
        with locked(path, new=True), room_for(path), published(path) as folder:
            files = {"config.json": write_hashed(folder / "config.json", config.to_bytes())}
            write_hashed(folder / BASE, found)
            write_hashed(folder / MANIFEST, Manifest(files, 0, {}).to_bytes())
        return cls(path, base)

    @classmethod
    def open(cls, path: Source, *, base: Source | None = None) -> "Store":
        """Open a store, and clear what a killed writer may have left beside it; `base` says where the base model is, if it has moved.

        Raises: `UserError` if there is no store, its config or manifest is damaged, or a newer siftmasks wrote it.
        """
        store = cls(Path(path).resolve(), base)
        store.snapshot()
        clear(store.path)
        return store

    def snapshot(self) -> Snapshot:
        """The version that stands now, for reading tensors of ledger and masks."""
        return Snapshot(self.path)

    @property
    def config(self) -> StoreConfig:
        """What was fixed by `init`."""
        return self.snapshot().config

    @property
    def tasks(self) -> list[str]:
        """The live tasks, sorted."""
        return self.snapshot().tasks

    def digest(self) -> str:
        """SHA-256 of the manifest, which has the SHA-256 of every canonical file. `check` hashes the files themselves."""
        return self.snapshot().manifest.digest

    def check(self) -> None:
        """Hash every file again. Raises: `UserError` that names each that is damaged, missing or does not belong there."""
        from siftmasks.checking import check

        check(self.path)

    def base(self) -> Checkpoint:
        """The base model, open for reading, once its hash is that in the config; `base.json` remembers where it was at `init`.

        Raises: `UserError` if it is not there or is another.
        """
        from siftmasks.base_model import base_sha256, open_base

        if self._base is None:
            try:
                source = self._source or self.snapshot().base()
                checkpoint = open_base(os.fspath(source))
            except UserError as error:
                raise UserError(
                    f"the base of {self.path} cannot be read ({error}): open the store with base=, or pass --base"
                ) from None
            if base_sha256(checkpoint) != self.config.base:
                raise UserError(f"{source} is not the base of {self.path}: its tensors have another hash")
            self._base = checkpoint
        return self._base

    def learn(self, task: str, examples: "Sequence[Any]", *, model: "torch.nn.Module", loss: "Loss") -> int:
        """Train a task with `sift` from the base model and add it; returns how many coordinates lay beyond the grid.

        `model` holds the base weights and does so afterwards. Raises: `UserError`, with the store unchanged, if the task is in it
        already, there is no room, the id or the data cannot be used, the model is not the base, or the loss is NaN or infinite.
        """
        return self.learn_many({task: examples}, model=model, loss=loss)[task]

    def learn_many(self, examples: "Examples", *, model: "torch.nn.Module", loss: "Loss") -> dict[str, int]:
        """Do as `learn` for several tasks, in one version of the store: after an error it has none of them."""
        from siftmasks.learning import learn

        return learn(self.path, self._training(examples, model, loss))

    def learn_from(self, task: str, checkpoint: Source) -> "Imported":
        """Add a task that was trained elsewhere (policy "archive" only): the difference between its checkpoint and the base.

        In mode "sift", what lies against the sign vector is dropped: the result's `lost` says how much. Raises: `UserError`, with the
        store unchanged, as `learn` does, and if the checkpoint has other tensors than the base or differs in one that is not trained.
        """
        return self.learn_many_from({task: checkpoint})[task]

    def learn_many_from(self, checkpoints: Mapping[str, Source]) -> "dict[str, Imported]":
        """Do as `learn_from` for several tasks, in one version; base and ledger are read once, and memory does not grow with the tasks."""
        from siftmasks.learning import add_checkpoints

        return add_checkpoints(self.path, self.base(), checkpoints)

    def forget(
        self, tasks: Collection[str], examples: "Examples | None" = None, *, model: "torch.nn.Module | None" = None,
        loss: "Loss | None" = None, certificate: Source | None = None, note: str | None = None,
    ) -> "dict[str, Any] | None":  # fmt: skip
        """Remove tasks, exactly: the store is then the one that learned only the others.

        Each task vector is derived again from its `examples` (policy "archive": taken from the archive, unless examples are given) and
        must equal its commitment in every tensor; all are compared before anything is subtracted. `certificate` is a file outside the
        store to write (see `write_certificate`), `note` a text for it; it is there only once the old version is gone.

        Returns: the certificate, if one is written.
        Raises: `RederivationMismatch` (a `UserError`), with the store unchanged, if one differs: then `rebuild`; `UserError` as `learn`.
        """
        from siftmasks.forgetting import forget

        named = _named(tasks)
        place = self._place(certificate)
        version, methods = forget(self.path, named, self._training(examples or {}, model, loss))
        return self._certify(place, version, methods, note)

    def forget_without(
        self, task: str, example_ids: Collection[str], examples: "Sequence[Any]", *, model: "torch.nn.Module", loss: "Loss",
        certificate: Source | None = None, note: str | None = None,
    ) -> "dict[str, Any] | None":  # fmt: skip
        """Forget examples of a task: replace it by its retrain on the others. `examples` are all, those to forget too. Else as `forget`."""
        from siftmasks.forgetting import forget_examples

        place = self._place(certificate)
        version, methods = forget_examples(self.path, task, example_ids, self._training({task: examples}, model, loss))
        return self._certify(place, version, methods, note)

    def rebuild(
        self, forgetting: Collection[str], examples: "Examples", *, model: "torch.nn.Module | None" = None,
        loss: "Loss | None" = None, certificate: Source | None = None, note: str | None = None,
    ) -> "dict[str, Any] | None":  # fmt: skip
        """Remove tasks without their data: make the ledgers that hold them anew from all other tasks of the same ledgers.

        `examples` are those of these other tasks: of `remaining(forgetting)`. Under the policy "archive" none are needed. With nothing to
        forget, all ledgers are made anew: that mends damage. Returns and raises: as `forget`.
        """
        from siftmasks.forgetting import rebuild

        named = _named(forgetting)
        place = self._place(certificate)
        version, methods = rebuild(self.path, named, self._training(examples, model, loss))
        return self._certify(place, version, methods, note)

    def remaining(self, forgetting: Collection[str]) -> list[str]:
        """The tasks whose data `rebuild` takes: the others in the ledgers that hold these."""
        return self.snapshot().remaining(_named(forgetting))

    def certify(self, certificate: Source, *, note: str | None = None) -> "dict[str, Any] | None":
        """Write the certificate of the store as it is: what a `forget` that was killed after its last step left undone.

        Clears what killed writers left and hashes every file first, and holds the store's lock meanwhile.
        Raises: `UserError`, without a certificate, as `check`, and if another process writes or something of a killed writer is left.
        """
        place = self._place(certificate)
        with locked(self.path):
            check_cleared(self.path)
            self.check()
            return self._certify(place, self.snapshot(), {"none"}, note)

    def verify(
        self, examples: "Examples", *, model: "torch.nn.Module | None" = None, loss: "Loss | None" = None,
        checkpoints: Mapping[str, Source] | None = None,
    ) -> "Verification":  # fmt: skip
        """Learn all tasks again, from examples or (those of `learn_from`) checkpoints, into an empty store, and compare the digests."""
        from siftmasks.verification import verify

        return verify(self.path, self._training(examples, model, loss), checkpoints or {})

    def weights(
        self, task: str | None, scale: "Scale" = "mean", *, dtype: "torch.dtype | None" = None
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Iterate over the trained tensors as they are served, sorted by name: θ0 + v m q N scale, rounded once to `dtype` (or the base's).

        `task` None gives the maskless model, for users that are unknown or forgotten. All else in the model is the base's. Scales: "mean",
        1/T (the paper's); "count", 1/C at each weight; "density", one number, trained weights over the sum of C.

        Raises: `UserError` for an unknown task or scale, and where a byte of what is read is not as the manifest has it.
        """
        from siftmasks.served import served_weights

        snapshot = self.snapshot()
        if task is not None:
            snapshot.require([task])
        return served_weights(snapshot, self.base(), task, scale, dtype)

    def task(
        self, name: str | None, model: "torch.nn.Module", scale: "Scale" = "mean"
    ) -> "AbstractContextManager[torch.nn.Module]":
        """Serve a task in a live model for the length of a block, `with store.task("alice", model):`; see `serving.task`."""
        from siftmasks.serving import task

        return task(self, name, model, scale)

    def backup(self, out: Source) -> None:
        """Copy the whole store, with commitments and archive, to a new folder, and check it. A backup keeps what is forgotten later."""
        from siftmasks.backup import copy_store

        copy_store(self.path, Path(out).resolve())

    @classmethod
    def restore(cls, backup: Source, path: Source) -> "Store":
        """Copy a backup to `path`, which must not exist, and check the copy. Tasks that were forgotten since are in it again."""
        from siftmasks.backup import copy_store

        copy_store(Path(backup).resolve(), Path(path).resolve())
        return cls.open(path)

    def _add(self, vectors: "Iterable[tuple[str, TaskVector]]") -> dict[str, int]:
        """Add what `sift` made in other processes, in one version: the queue's way in. A task that cannot be added leaves none of them."""
        from siftmasks.learning import add

        return add(self.path, vectors)

    def _training(self, examples: "Examples", model: "torch.nn.Module | None", loss: "Loss | None") -> "Training":
        from siftmasks.training import Training

        return Training(examples, model, loss, self.base)

    def _place(self, certificate: Source | None) -> Path | None:
        place = None if certificate is None else Path(certificate)
        check_place(place, self.path)
        return place

    @staticmethod
    def _certify(place: Path | None, version: Snapshot, methods: set[str], note: str | None) -> "dict[str, Any] | None":
        if place is None:
            return None
        try:
            return write_certificate(place, version, methods, note)
        except OSError as error:
            raise UserError(
                f"{version.path} is complete, but {place} could not be written ({error.strerror}): run `siftmasks certify` for it"
            ) from None


def _named(tasks: Collection[str]) -> list[str]:
    """Several tasks, sorted; a string is one."""
    return [tasks] if isinstance(tasks, str) else sorted({*tasks})
