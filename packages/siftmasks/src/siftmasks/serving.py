"""Serve a task in a live model: its weights take the place of the base's, and the base's come back."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.random import key
from siftmasks.base_model import same_bits
from siftmasks.config import StoreConfig
from siftmasks.ops.apply_mask import apply_mask
from siftmasks.served import Scale, scale_factor
from siftmasks.snapshot import Snapshot
from siftmasks.store import Store


@contextmanager
def task(store: Store, name: str | None, model: nn.Module, scale: Scale = "mean") -> Iterator[nn.Module]:
    """Give `model`, which holds the base weights, those of a task for the block; None is the model without a mask.

    The weights are `store.weights(name, scale)`, rounded once to the dtype that the model has; they are computed from the base checkpoint,
    never from those of another task, and written into the model's own tensors, on whatever device. When the block ends, however it
    ends, the base's come back the same way, bit for bit. Memory beyond the model: what its largest tensor needs. Reads the base three
    times: `Server` switches faster.

    Raises: `UserError`, with the model unchanged, for an unknown task or scale, a model that serves another task already, or one that is
    not the base (see `base_parameters`).
    """
    snapshot = _snapshot_with(store, name)
    base, factor = store.base(), scale_factor(snapshot, scale)
    with claimed(model, f"task {name!r}" if name is not None else "the maskless model"):
        parameters = base_parameters(model, base, snapshot.config)
        try:
            for tensor, parameter in parameters.items():
                weight = base.tensor(tensor).to(parameter.device)
                ledger = ledger_of(snapshot, tensor, factor, parameter.device)
                _write(parameter, served_tensor(snapshot, tensor, weight, ledger, factor, parameter.dtype, name))
            yield model
        finally:
            for tensor, parameter in parameters.items():
                _write(parameter, base.tensor(tensor))


class Server(AbstractContextManager["Server"]):
    """Serves one task after another in a live model; base and ledger stay on its device, so that a switch reads no more than a mask.

    >>> from lmcore.models import tiny_llama
    >>> from siftmasks.examples import Example
    >>> from siftmasks.settings import SiftSettings
    >>> folder, model, ids = Path(tempfile.mkdtemp()), tiny_llama(vocab_size=16, layers=1), torch.arange(4)[None]
    >>> model.save_pretrained(folder / "base")
    >>> store = Store.init(folder / "store", folder / "base", settings=SiftSettings(learning_rate=0.01, steps=2))
    >>> _ = store.learn("alice", [Example("1", {})], model=model, loss=lambda model, _: model(ids, labels=ids).loss)
    >>> with Server(store, model) as server:
    ...     server.switch("alice")
    ...     server.task
    'alice'

    Memory on the device, besides the model: each trained weight of the base in its own dtype, its N, and C with the scale "count" (P in
    mode "signs"). The weights are those of `task`, bit for bit. `close`, or the end of the block, gives the model the base weights back.

    What it serves it looks up in the store at every switch: a task that was learned meanwhile can be served, one that was forgotten
    cannot, and the ledger is read again. Until then the model keeps the weights that it has.

    Raises: `UserError` as `task` does.
    """

    def __init__(self, store: Store, model: nn.Module, *, scale: Scale = "mean"):
        base, snapshot = store.base(), store.snapshot()
        scale_factor(snapshot, scale)
        self._store, self._model, self._scale = store, model, scale
        self._claim = claimed(model, "a server's tasks")
        self._claim.__enter__()
        try:
            self._parameters = base_parameters(model, base, snapshot.config)
            self._base = {name: base.tensor(name).to(parameter.device) for name, parameter in self._parameters.items()}
            self._read(snapshot)
        except BaseException:
            self._claim.__exit__(None, None, None)
            raise
        self.task: str | None = None
        """The task that `switch` was last given."""

    def switch(self, task: str | None) -> None:
        """Serve a task; None is the model without a mask.

        Raises: `UserError` for an unknown task or a damaged file; the model then has the base weights. `ValueError` after `close`.
        """
        if not self._base:
            raise ValueError("this server is closed: make another")
        try:
            snapshot = _snapshot_with(self._store, task)
            if snapshot.manifest.digest != self._digest:
                self._read(snapshot)
            for name, parameter in self._parameters.items():
                base, ledger = self._base[name], self._ledger[name]
                _write(parameter, served_tensor(snapshot, name, base, ledger, self._factor, parameter.dtype, task))
        except BaseException:
            self.restore()
            raise
        self.task = task

    def restore(self) -> None:
        """Give the model its base weights back; it can be switched again."""
        self.task = None
        for name, parameter in self._parameters.items():
            _write(parameter, self._base[name])

    def close(self) -> None:
        """Give the model its base weights back and free the memory."""
        if self._base:
            self.restore()
            self._claim.__exit__(None, None, None)
        self._base.clear()
        self._ledger.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, snapshot: Snapshot) -> None:
        factor = scale_factor(snapshot, self._scale)
        self._ledger: dict[str, dict[str, Tensor]] = {
            name: ledger_of(snapshot, name, factor, parameter.device) for name, parameter in self._parameters.items()
        }
        self._digest, self._factor = snapshot.manifest.digest, factor


def ledger_of(snapshot: Snapshot, name: str, factor: float | None, device: torch.device) -> dict[str, Tensor]:
    """Return the parts of the ledger that one tensor is served from: N, C without a factor, P in mode "signs"."""
    parts = [part for part in snapshot.config.parts if part != "count" or factor is None]
    return {part: snapshot.ledger(part, name).to(device) for part in parts}


def served_tensor(
    snapshot: Snapshot, name: str, base: Tensor, ledger: Mapping[str, Tensor], factor: float | None, dtype: torch.dtype,
    task: str | None,
) -> Tensor:  # fmt: skip
    """Return one tensor as it is served for a task (None: the maskless model), from what `ledger_of` gives; of zeros, its delta."""
    bits = None if task is None else snapshot.mask(task, name).to(base.device)
    return masked(snapshot.config, name, base, ledger, factor, dtype, bits)


def masked(
    config: StoreConfig, name: str, base: Tensor, ledger: Mapping[str, Tensor], factor: float | None, dtype: torch.dtype,
    bits: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return what `served_tensor` does, for any bits."""
    signed, settings = config.settings.mode == "signs", config.settings
    return apply_mask(
        base, ledger["total"], bits, step=settings.grid.step, scale=factor, key=None if signed else key(settings.seed, name),
        count=ledger.get("count"), positive=ledger.get("positive") if bits is None else None, dtype=dtype,
    )  # fmt: skip


def base_parameters(model: nn.Module, base: Checkpoint, config: StoreConfig) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by their names in the base, once its weights are known to be the base's, bit for bit.

    The model may be in another dtype than the base, each weight rounded once, as transformers loads it.
    Raises: `UserError` naming a parameter that only one of them has, that is on no device, or whose shape or bits differ.
    """
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():  # a tied weight is there under all its names, saved under one
        names.setdefault(id(tensor), []).append(name)
    load_it = f"load the model from {base.path}"
    for parameter in model.parameters():
        if not any(name in base.tensors for name in names[id(parameter)]):
            raise UserError(f"the model has {names[id(parameter)][0]}, which the base lacks: {load_it}")
    for name in config.tensors:
        if name not in state:
            raise UserError(f"the model lacks {name}, which the tasks train: {load_it}")
    for name in state.keys() & base.tensors.keys():
        tensor, shape = state[name].detach(), base.tensors[name].shape
        if tensor.is_meta:
            raise UserError(f"{name} of the model is on no device: load it without offloading")
        if tensor.shape != shape:
            raise UserError(f"{name} of the model has the shape {[*tensor.shape]}, that of the base {[*shape]}: {load_it}")
        if not same_bits(tensor, base.tensor(name).to(tensor.device, tensor.dtype)):
            raise UserError(f"{name} of the model is not that of the base: {load_it}")
    return {name: state[name] for name in config.tensors}


@contextmanager
def claimed(model: nn.Module, what: str) -> Iterator[None]:
    """Keep a model for what it serves. Raises: `UserError` if it serves something else."""
    if model in _claims:
        raise UserError(f"the model serves {_claims[model]} already: leave that block first")
    _claims[model] = what
    try:
        yield
    finally:
        _claims.pop(model, None)  # a server that was never closed may outlive the table


_claims: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _snapshot_with(store: Store, task: str | None) -> Snapshot:
    snapshot = store.snapshot()
    if task is not None:
        snapshot.require([task])
    return snapshot


def _write(parameter: nn.Parameter, weight: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(weight)
