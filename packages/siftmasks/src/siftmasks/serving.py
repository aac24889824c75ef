"""Serve a task in a live model: its weights take the place of the base's, and the base's come back."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.base_model import base_tensors
from siftmasks.config import StoreConfig
from siftmasks.served import Scale, Served
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
    base, served = store.base(), Served(snapshot, scale)
    with claimed(model, f"task {name!r}" if name is not None else "the maskless model"):
        parameters = base_parameters(model, base, snapshot.config)
        try:
            for tensor, parameter in parameters.items():
                device = parameter.device
                weight, ledger, bits = (
                    base.tensor(tensor).to(device),
                    served.ledger(tensor, device),
                    served.bits(tensor, name, device),
                )
                _serve(served, tensor, parameter, weight, ledger, bits)
            yield model
        finally:
            with torch.no_grad():
                for tensor, parameter in parameters.items():
                    parameter.copy_(base.tensor(tensor))


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
        self._store, self._scale, self._served = store, scale, Served(snapshot, scale)
        self._claim = claimed(model, "a server's tasks")
        self._claim.__enter__()
        try:
            self._parameters = base_parameters(model, base, snapshot.config)
            self._base = {name: base.tensor(name).to(parameter.device) for name, parameter in self._parameters.items()}
            self._read_ledger(snapshot)
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
            self._served = Served(snapshot, self._scale)
            if snapshot.manifest.digest != self._digest:
                self._read_ledger(snapshot)
            for name, parameter in self._parameters.items():
                bits = self._served.bits(name, task, parameter.device)
                _serve(self._served, name, parameter, self._base[name], self._ledger[name], bits)
        except BaseException:
            self.restore()
            raise
        self.task = task

    def restore(self) -> None:
        """Give the model its base weights back; it can be switched again."""
        self.task = None
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._base[name])

    def close(self) -> None:
        """Give the model its base weights back and free the memory."""
        if self._base:
            self.restore()
            self._claim.__exit__(None, None, None)
        self._base.clear()
        self._ledger.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ledger(self, snapshot: Snapshot) -> None:
        self._ledger = {name: self._served.ledger(name, parameter.device) for name, parameter in self._parameters.items()}
        self._digest = snapshot.manifest.digest


def base_parameters(model: nn.Module, base: Checkpoint, config: StoreConfig) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by their names in the base, once its weights are known to be the base's, bit for bit.

    The model may be in another dtype than the base, each weight rounded once, as transformers loads it.
    Raises: `UserError` naming a trained parameter that the model lacks; else as `base_model.base_tensors`.
    """
    tensors: dict[str, Any] = base_tensors(model, base)
    if missing := [name for name in config.tensors if name not in tensors]:
        raise UserError(f"the model lacks {missing[0]}, which the tasks train: load the model from {base.path}")
    return {name: tensors[name] for name in config.tensors}


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


def _serve(
    served: Served, name: str, parameter: nn.Parameter, base: Tensor, ledger: Mapping[str, Tensor], bits: Tensor | None
) -> None:
    """Write a served tensor to a parameter, without another in between unless its memory has gaps or another order."""
    with torch.no_grad():
        if parameter.is_contiguous():
            served.tensor(name, base, ledger, bits, out=parameter.detach())
            torch.autograd.graph.increment_version(parameter)  # so that no gradient is computed with weights that are gone
        else:
            parameter.copy_(served.tensor(name, base, ledger, bits, dtype=parameter.dtype))
