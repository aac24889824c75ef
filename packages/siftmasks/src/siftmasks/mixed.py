"""Serve a batch whose rows belong to different tasks in one forward pass, without a copy of the weights per task."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmcore.errors import UserError
from siftmasks.mixed_modules import ForwardPerRow, LinearPerRow, MixedModule, PositionBiasPerRow, TaskTensors
from siftmasks.served import Scale
from siftmasks.serving import base_parameters, claimed
from siftmasks.store import Store

_SEQUENCE_FIRST = ("fsmt", "led", "longformer", "reformer", "xlnet")
"""Model types in some layers of which the sequence, or chunks of it, comes before the batch."""


@contextmanager
def mixed(
    store: Store,
    model: nn.Module,
    tasks: Sequence[str | None],
    *,
    scale: Scale = "mean",
    delta_dtype: torch.dtype | None = None,
) -> Iterator["MixedBatch"]:
    """Serve row i of every batch as `tasks[i]` for the block; None is the model without a mask.

        with mixed(store, model, ["alice", "bob", None, "alice"]) as batch:
            model.generate(**four_rows)
            batch.assign(["carol", "bob"])
            model(**two_rows)

    Each row gets what `serving.task` gives it alone, within rounding: the model computes with the base weights and adds, in the modules
    that are trained, what the delta of the row's task makes of their inputs. Linear layers (torch's and GPT-2's `Conv1D`) do it by
    `masked_delta_mm`; a module without children, such as a norm, runs with a weight per row. A batch of k times as many rows as tasks, as
    beam search and `num_return_sequences` make it, has k rows for each task in turn. No gradients are recorded in the block.

    `delta_dtype` is that of the linear layers' deltas and products; None is that of each weight, but float32 for float16, in which small
    deltas would be 0. Their sum with the output of the layer is rounded to the model's dtype: where bfloat16 swallows a delta that is
    added to a weight, as `serving.task` does, its product with the inputs can still be large enough to count.
    Memory beyond the model: one delta, the bits of each distinct task, and all but linear layers once per distinct task (per row while
    they run).

    Raises: `UserError` as `serving.task` does; for a mixture of experts and models that put the sequence before the batch, in which rows
    cannot be followed; for a trained parameter that no rule above covers; in a forward pass, if the rows do not fit the tasks.
    Limits: where weights are read without calling their module (the fused kernels of some state space models), the base is served.
    """
    with claimed(model, "a batch of tasks"), torch.no_grad(), ExitStack() as stack:
        batch = MixedBatch(store, model, scale, delta_dtype)
        batch.assign(tasks)
        for module in batch.modules:
            stack.enter_context(module.attached(batch.rows))
        yield batch


class MixedBatch:
    """The tasks of the rows of a batch, and the modules that serve them: what `mixed` yields."""

    def __init__(self, store: Store, model: nn.Module, scale: Scale, delta_dtype: torch.dtype | None):
        self._store, self._scale = store, scale
        check_rows(model)
        snapshot = store.snapshot()
        self._digest = snapshot.manifest.digest
        self.modules = mixed_modules(model, base_parameters(model, store.base(), snapshot.config), delta_dtype)
        self.tasks: list[str | None] = []
        self._of_row = torch.empty(0, dtype=torch.int64)

    def assign(self, tasks: Sequence[str | None]) -> None:
        """Change the tasks of the rows; of the bits, only those of tasks that were not in the batch are read.

        Raises: `UserError` for no or an unknown task, and if the store has changed since the block began.
        """
        snapshot = self._store.snapshot()
        if snapshot.manifest.digest != self._digest:
            raise UserError(f"{self._store.path} has changed since the batch began: begin another")
        named = sorted({task for task in tasks if task is not None})
        if named or not tasks:
            snapshot.require(named)
        self.tasks = []  # until all modules have what they need: an error half-way must not mix two batches
        tensors = TaskTensors(snapshot, self._store.base(), self._scale)
        for module in self.modules:
            module.load(tensors, named, None in tasks)
        self.tasks = [*tasks]
        self._of_row = torch.tensor([-1 if task is None else named.index(task) for task in tasks])

    def rows(self, leading: int, count: int, device: torch.device) -> Tensor:
        """Return the task of each of `count` vectors in a tensor of `leading` rows: int64 [count], -1 for None, else in sorted order."""
        tasks = len(self.tasks)
        if not tasks or leading % tasks:
            raise UserError(f"a module was given {leading} rows, which is no multiple of the {tasks} tasks of the batch")
        self._of_row = self._of_row.to(device)
        return self._of_row.repeat_interleave(count // tasks)


def mixed_modules(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], delta_dtype: torch.dtype | None
) -> list[MixedModule]:
    """Return what serves each module of `model` that has one of the trained parameters, also where it is tied to another's.

    Raises: `UserError` for a parameter that has no rows.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    served: list[MixedModule] = []
    for path, module in model.named_modules():
        trained = {slot: names[id(own)] for slot, own in module._parameters.items() if id(own) in names}
        parent = model.get_submodule(path.rpartition(".")[0])
        kind: type[MixedModule]
        if not trained:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            kind = LinearPerRow
        elif isinstance(module, nn.Embedding) and hasattr(parent, "compute_bias"):
            module, kind = parent, PositionBiasPerRow
            trained = {f"{path.rpartition('.')[2]}.{slot}": name for slot, name in trained.items()}
        elif any(module.children()) or (isinstance(module, nn.Embedding) and re.search(r"\.\d+\.", path)):
            raise UserError(f"{min(trained.values())} has no rows that could be of different tasks: serve them one by one")
        else:
            kind = ForwardPerRow
        served.append(kind(module, trained, delta_dtype))
    return served


def check_rows(model: nn.Module) -> None:
    """Raise `UserError` if the rows of a batch cannot be followed through the layers of `model`."""
    config: dict[str, Any] = model.config.to_dict() if hasattr(model, "config") else {}  # type: ignore[operator, union-attr]
    if config.get("model_type") in _SEQUENCE_FIRST or _has_experts(config):
        reason = "a mixture of experts" if _has_experts(config) else f"of type {config['model_type']}"
        raise UserError(f"the model is {reason}, in which the rows of a batch cannot be followed: serve its tasks one by one")


def _has_experts(config: Mapping[Any, Any]) -> bool:
    """Whether a configuration, or one within it, says that there is more than one expert (`num_local_experts`, `n_routed_experts`, ...)."""
    for key, value in config.items():
        if isinstance(value, dict) and _has_experts(value):
            return True
        if isinstance(value, int) and value > 1 and re.search(r"n(um)?_(\w+_)?experts$", str(key)):
            return True
    return False
