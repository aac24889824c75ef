"""What the ops ask of their tensors."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)


def expect(name: str, tensor: Tensor, like: Tensor, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """Raise a `ValueError` that names the tensor unless it has one of the dtypes and the shape and device of `like`, or another shape."""
    wanted = tuple(like.shape) if shape is None else shape
    if tuple(tensor.shape) != wanted or tensor.dtype not in dtypes or tensor.device != like.device:
        came = f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{came}: expected {' or '.join(map(str, dtypes))} {wanted} on {like.device}")


def expect_in_place(name: str, tensor: Tensor, like: Tensor, *dtypes: torch.dtype) -> None:
    """Do the same for a tensor that the op changes, which must also be contiguous."""
    expect(name, tensor, like, *dtypes)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} changes in place: it must be contiguous")
