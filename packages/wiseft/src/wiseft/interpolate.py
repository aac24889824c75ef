"""Interpolate two checkpoints into a live model, in place."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from wiseft.merging import Source
from wiseft.ops.lerp import lerp
from wiseft.plan import check_delta

if TYPE_CHECKING:
    import torch


def interpolate_(
    model: "torch.nn.Module",
    early: "Source | Mapping[str, torch.Tensor]",
    late: "Source | Mapping[str, torch.Tensor]",
    delta: float,
) -> "torch.nn.Module":
    """Set every floating-point parameter and buffer of `model` to `delta * early + (1 - delta) * late`, in place.

    Checkpoints on disk are read one tensor at a time, so a sweep over deltas needs no second model; state dicts are used as they are,
    which makes it a matter of milliseconds. The arithmetic runs where the parameter is: float64 on a CPU, float32 on a GPU (see `lerp`),
    then one rounding to the dtype of LATE and, where the model's differs, another to the model's. Integers become LATE's. Parameters that
    FSDP2 shards (DTensor) get their own shard; every rank must then call this. Nothing is written if a name or a shape does not match.

    >>> from lmcore.models import tiny_llama
    >>> early, late = (tiny_llama(vocab_size=16, seed=seed).state_dict() for seed in (1, 2))
    >>> model = interpolate_(tiny_llama(vocab_size=16), early, late, delta=0.25)
    >>> expected = 0.25 * early["lm_head.weight"] + 0.75 * late["lm_head.weight"]
    >>> torch.allclose(model.lm_head.weight, expected)
    True

    Returns: `model`. Raises: `UserError` for a name or shape that does not match.
    """
    import torch

    delta = check_delta(delta)
    with ExitStack() as stack, torch.no_grad():
        ends = [_Weights(source, stack) for source in (early, late)]
        live = _untied(model)
        names = [next((alias for alias in aliases if alias in ends[1].shapes), aliases[0]) for aliases, _ in live]
        for name, (_, weight) in zip(names, live, strict=True):
            for end, role in zip(ends, ("early", "late"), strict=True):
                found = end.shapes.get(name)
                if found != tuple(weight.shape):
                    raise UserError(
                        f"the {role} checkpoint has {found or 'no tensor'} for {name}, the model {tuple(weight.shape)}"
                    )
        for name, (_, weight) in zip(names, live, strict=True):
            a, b = ends[0].tensor(name), ends[1].tensor(name)
            if b.is_floating_point():
                b = lerp(a.to(weight.device), b.to(weight.device), delta)
            _assign(weight, b)
    return model


class _Weights:
    """Tensors by name, from a checkpoint on disk or a state dict."""

    def __init__(self, source: "Source | Mapping[str, torch.Tensor]", stack: ExitStack):
        self.tensor: Callable[[str], torch.Tensor]
        if isinstance(source, Mapping):
            self.tensor = source.__getitem__
            self.shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        else:
            checkpoint = stack.enter_context(Checkpoint.open(source))
            self.shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
            self.tensor = checkpoint.tensor


def _untied(model: "torch.nn.Module") -> "list[tuple[list[str], torch.Tensor]]":
    """Each saved parameter and buffer once, with all its names: a tied weight is saved under one of them only."""
    named: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        named.setdefault(id(weight), ([], weight))[0].append(name)
    return list(named.values())


def _assign(weight: "torch.Tensor", value: "torch.Tensor") -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        value = value.to(weight.device_mesh.device_type)
        weight.to_local().copy_(distribute_tensor(value, weight.device_mesh, weight.placements).to_local())
    else:
        weight.copy_(value)
