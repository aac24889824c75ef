"""What the ops ask of their tensors."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> None:
    """Raise a `ValueError` that names the tensor unless it has this shape, this device and one of the dtypes."""
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        came = f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{came}: expected {' or '.join(map(str, dtypes))} {shape} on {device}")


def expect_below(name: str, tensor: Tensor, count: int, *, least: int) -> None:
    """Raise a `ValueError` unless the numbers of a CPU tensor lie in [least, count); those of a GPU are not waited for."""
    if tensor.numel() and not tensor.is_cuda:
        low, high = (int(number) for number in tensor.aminmax())
        if low < least or high >= count:
            raise ValueError(f"{name} goes from {low} to {high}: expected {least} to {count - 1}")
