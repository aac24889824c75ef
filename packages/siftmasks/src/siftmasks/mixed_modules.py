"""How a module serves rows of different tasks: linear layers by the product with the delta, others with a weight per row."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.pytorch_utils import Conv1D

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.bits import pack_bits, unpack_bits
from siftmasks.ops.masked_delta_mm import masked_delta_mm
from siftmasks.served import Scale, Served
from siftmasks.snapshot import Snapshot

Rows = Callable[[int, int, torch.device], Tensor]
"""`MixedBatch.rows`: the task of each vector."""


class TaskTensors:
    """Tensors of one version of a store, as these modules need them; each goes to the device of the parameter that it is `like`."""

    def __init__(self, snapshot: Snapshot, base: Checkpoint, scale: Scale):
        self._base, self._served = base, Served(snapshot, scale)
        self.signed = snapshot.config.settings.mode == "signs"

    def bits(self, name: str, like: Tensor, task: str) -> Tensor:
        """The packed bits of a task."""
        return self._served.snapshot.mask(task, name).to(like.device)

    def weight(self, name: str, like: Tensor, task: str | None) -> Tensor:
        """A weight as `serving.task` would write it to `like`."""
        base = self._base.tensor(name).to(like.device)
        return self._tensor(name, base, self._served.bits(name, task, like.device), like.dtype)

    def delta(self, name: str, like: Tensor, dtype: torch.dtype, task: str | None) -> Tensor:
        """A served weight less the base's: of a task, or of the maskless model."""
        return self._tensor(name, _zeros(like), self._served.bits(name, task, like.device), dtype)

    def choice(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """What a task's bits keep (mode "sift") or give their sign to (mode "signs"): the delta of a task whose bits are all 1."""
        ones = torch.full(((like.numel() + 7) // 8,), 255, dtype=torch.uint8, device=like.device)
        return self._tensor(name, _zeros(like), ones, dtype)

    def _tensor(self, name: str, base: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self._served.tensor(name, base, self._served.ledger(name, base.device), bits, dtype=dtype)


class MixedModule(ABC):
    """A module, the names in the base of its trained parameters by their places in it, and what it needs of the tasks."""

    @abstractmethod
    def __init__(self, module: nn.Module, names: Mapping[str, str], delta_dtype: torch.dtype | None): ...

    @abstractmethod
    def load(self, tensors: TaskTensors, tasks: Sequence[str], maskless: bool) -> None:
        """Read what the next batch needs: of tasks, sorted, and of the maskless model if any row has it."""

    @abstractmethod
    def attached(self, rows: Rows) -> AbstractContextManager[None]:
        """Serve the rows for the block."""


class LinearPerRow(MixedModule):
    """A linear layer: its output with the base weights, plus `x_r (delta ⊙ m_t)ᵀ` and the delta of its bias."""

    def __init__(self, module: nn.Module, names: Mapping[str, str], delta_dtype: torch.dtype | None):
        self._module: Any = module
        self._weight, self._bias = names.get("weight"), names.get("bias")
        dtype = module.get_parameter("weight").dtype
        self._dtype = delta_dtype or (torch.float32 if dtype == torch.float16 else dtype)
        self._signed, self._tasks = False, list[str]()
        self._delta: Tensor | None = None
        self._bits: Tensor | None = None
        self._maskless: Tensor | None = None
        self._bias_delta: Tensor | None = None

    def load(self, tensors: TaskTensors, tasks: Sequence[str], maskless: bool) -> None:
        """Make the delta, once, and stack the bits of the tasks."""
        if self._weight is not None:
            self._signed, weight = tensors.signed, self._module.weight
            if self._delta is None:
                self._delta = self._turned(tensors.choice(self._weight, weight, self._dtype))
            if maskless and self._signed and self._maskless is None:
                self._maskless = self._turned(tensors.delta(self._weight, weight, self._dtype, None))
            known = {} if self._bits is None else dict(zip(self._tasks, self._bits, strict=True))
            stack = torch.empty(len(tasks), (weight.numel() + 7) // 8, dtype=torch.uint8, device=weight.device)
            for bits, task in zip(stack, tasks, strict=True):
                bits.copy_(known[task] if task in known else self._turned_bits(tensors.bits(self._weight, weight, task)))
            self._bits, self._tasks = stack, [*tasks]
        if self._bias is not None:
            delta_of = partial(tensors.delta, self._bias, self._module.bias, self._dtype)
            self._bias_delta = stacked(delta_of, tasks, maskless)

    @contextmanager
    def attached(self, rows: Rows) -> Iterator[None]:
        """Add the deltas to what the layer returns."""

        def add_delta(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = args
            vectors = x.reshape(-1, x.shape[-1]).to(self._dtype)
            task_of_row = rows(len(x), len(vectors), x.device)
            moved: Any = 0 if self._bias_delta is None else self._bias_delta[task_of_row]
            if self._delta is not None and self._bits is not None:
                product = masked_delta_mm(vectors, self._delta, self._bits, task_of_row, signed=self._signed)
                if self._maskless is not None:
                    without = (task_of_row == -1).nonzero()[:, 0]
                    product[without] = vectors[without] @ self._maskless.T
                moved = product + moved
            return (output + moved.view(output.shape)).to(output.dtype)

        handle = self._module.register_forward_hook(add_delta)
        try:
            yield
        finally:
            handle.remove()

    def _turned(self, delta: Tensor) -> Tensor:
        """From [in, out] to [out, in], if it is GPT-2's."""
        return delta.T.contiguous() if isinstance(self._module, Conv1D) else delta

    def _turned_bits(self, bits: Tensor) -> Tensor:
        if not isinstance(self._module, Conv1D):
            return bits
        weight = self._module.weight
        return pack_bits(unpack_bits(bits, weight.numel()).view(weight.shape).T)


class ForwardPerRow(MixedModule):
    """A module without children, such as a norm: its forward pass is vectorised over rows, each with the weights of its task."""

    method = "forward"

    def __init__(self, module: nn.Module, names: Mapping[str, str], delta_dtype: torch.dtype | None):
        self._module, self._names = module, names
        self._served: dict[str, Tensor] = {}

    def load(self, tensors: TaskTensors, tasks: Sequence[str], maskless: bool) -> None:
        """Make the weights of each task."""
        for slot, name in self._names.items():
            weight_of = partial(tensors.weight, name, self._module.get_parameter(slot))
            self._served[slot] = stacked(weight_of, tasks, maskless)

    @contextmanager
    def attached(self, rows: Rows) -> Iterator[None]:
        """Put the vectorised method in the place of the module's own."""
        original, before = Method(self._module, self.method), vars(self._module).get(self.method)

        def per_row(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            leading = self._leading(leaves)
            device = next(iter(self._served.values())).device
            numbers = rows(leading, leading, device)
            weights = {f"module.{slot}": served[numbers] for slot, served in self._served.items()}
            of_row = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) > 1 for leaf in leaves]

            def one_row(weights: dict[str, Tensor], leaves: list[Any]) -> Any:
                inputs = [leaf[None] if sliced else leaf for leaf, sliced in zip(leaves, of_row, strict=True)]
                return functional_call(original, weights, *tree_unflatten(inputs, form))

            dims = [0 if sliced else None for sliced in of_row]
            outputs = vmap(one_row, (0, dims), randomness="different")(weights, leaves)
            return tree_map(self._joined, outputs)

        setattr(self._module, self.method, per_row)
        try:
            yield
        finally:
            delattr(self._module, self.method)
            if before is not None:
                setattr(self._module, self.method, before)

    def _leading(self, leaves: Sequence[Any]) -> int:
        """How many rows the inputs have; a tensor of one row goes to all of them."""
        return max((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0), default=1)

    def _joined(self, output: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[1] != 1:
            raise UserError(f"the module of {min(self._names.values())} does not return rows: serve the tasks one by one")
        return output.flatten(0, 1)


class PositionBiasPerRow(ForwardPerRow):
    """An attention of T5's kind: what it computes once for all rows, from an embedding of relative positions, becomes one per row."""

    method = "compute_bias"

    @contextmanager
    def attached(self, rows: Rows) -> Iterator[None]:
        """Do as the others, with the number of rows from the inputs of the attention."""
        handle = self._module.register_forward_pre_hook(self._count, with_kwargs=True)
        try:
            with super().attached(rows):
                yield
        finally:
            handle.remove()

    def _leading(self, leaves: Sequence[Any]) -> int:
        return self._rows

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows = len(args[0] if args else kwargs["hidden_states"])


class Method(nn.Module):
    """A method of a module, as a module of its own that `functional_call` can give other weights."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self._method = module, getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._method(*args, **kwargs)


def stacked(tensor_of: Callable[[str | None], Tensor], tasks: Sequence[str], maskless: bool) -> Tensor:
    """Return the tensors of tasks, one after another; the maskless one is the last, and so it is number -1 too."""
    return torch.stack([tensor_of(task) for task in [*tasks, *([None] if maskless else [])]])


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device)
