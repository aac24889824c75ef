"""The base model of a store: its identity, whatever files it is kept in, and the checks that nothing else is trained or served."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.models import smollm2_folder
from siftmasks.settings import SiftSettings
from siftmasks.trainable import trainable_names

_BLOCK = 2**24
_FLOATS = ("F32", "BF16", "F16")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def open_base(source: str | Path) -> Checkpoint:
    """Open a base model: a folder, a file, a Hub id or the packaged "smollm2"."""
    return Checkpoint.open(smollm2_folder() if source == "smollm2" else source)


def base_sha256(checkpoint: Checkpoint) -> str:
    """Return the identity of a base model: SHA-256 of the lines `name dtype shape sha256-of-its-bytes`, one per tensor, sorted.

    Sharding, file names and metadata play no part. Memory: one block, whatever the size of the model.
    """
    lines = []
    for name, info in checkpoint.tensors.items():
        digest = sha256()
        for start in range(0, info.nbytes, _BLOCK):
            digest.update(checkpoint.read(name, start, min(start + _BLOCK, info.nbytes)).data)
        lines.append(f"{name} {info.dtype} {[*info.shape]} {digest.hexdigest()}")
    return sha256("\n".join(sorted(lines)).encode()).hexdigest()


def trainable_tensors(
    checkpoint: Checkpoint, settings: SiftSettings, names: Sequence[str] | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors to train, sorted by name: `names`, or those of `siftmasks.trainable.trainable_names`.

    Raises: `UserError` naming a tensor that the checkpoint lacks or that is neither float32, bfloat16 nor float16.
    """
    chosen = {}
    for name in sorted(_names_by_architecture(checkpoint, settings) if names is None else names):
        info = checkpoint.tensors.get(name)
        if info is None or info.dtype not in _FLOATS:
            found = f"has it as {info.dtype}" if info else "has no such tensor"
            raise UserError(f"{name} is to be trained, but {checkpoint.path} {found}: expected one of {', '.join(_FLOATS)}")
        chosen[name] = (info.dtype, info.shape)
    return chosen


def check_model(model: nn.Module, checkpoint: Checkpoint, settings: SiftSettings) -> None:
    """Check that the weights of `model`, as they are trained (in `settings.dtype`), are those of the base. Raises: as `base_tensors`."""
    base_tensors(model, checkpoint, getattr(torch, settings.dtype))


def base_tensors(model: nn.Module, base: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by their names in the base, once they are known to have the base's bits.

    They are compared in `dtype`, to which each weight is rounded once; None is that of each tensor of the model, as transformers loads it.
    Raises: `UserError` naming a parameter that the base lacks, that is on no device, or a tensor whose shape or bits differ.
    """
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():  # a tied weight is there under all its names, saved under one
        names.setdefault(id(tensor), []).append(name)
    load_it = f"load the model from {base.path}"
    for tensor in state.values():
        known = names[id(tensor)]
        if isinstance(tensor, nn.Parameter) and not any(name in base.tensors for name in known):
            raise UserError(f"the model has {known[0]}, which the base lacks: {load_it}")
    found = {name: state[name] for name in base.tensors if name in state}
    for name, tensor in found.items():
        shape = base.tensors[name].shape
        if tensor.is_meta:
            raise UserError(f"{name} of the model is on no device: load it without offloading")
        if tensor.shape != shape:
            raise UserError(f"{name} of the model has the shape {[*tensor.shape]}, that of the base {[*shape]}: {load_it}")
        common = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not same_bits(tensor.detach().to(common), base.tensor(name).to(tensor.device).to(common)):
            raise UserError(f"{name} of the model is not that of the base: {load_it}")
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors on one device have the same dtype, shape and bits: 0.0 is not -0.0, and a NaN is itself.

    >>> same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")])), same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    (True, False)
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    integers = _INTEGERS[one.element_size()]
    return torch.equal(one.reshape(-1).view(integers), other.reshape(-1).view(integers))


def _names_by_architecture(checkpoint: Checkpoint, settings: SiftSettings) -> list[str]:
    """Names from a model without weights, of the class that the folder's config.json names."""
    import transformers

    folder = Path(checkpoint.path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json that would say which tensors are embeddings or head: name the trainable ones"
        )
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or ["(none)"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(f"{folder}: config.json names the architecture {architecture}, which transformers does not have")
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    return trainable_names(model, settings.freeze)
