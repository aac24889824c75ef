"""One matrix product per task of the batch: the oracle of the kernels."""

import torch
from torch import Tensor

from siftmasks.bits import unpack_bits


def masked_delta_mm(x: Tensor, delta: Tensor, bits: Tensor, task_of_row: Tensor, signed: bool) -> Tensor:
    """Return `x_r (delta ⊙ m_t)ᵀ` for each row, summed in float32."""
    out = x.new_empty(len(x), len(delta))
    for task in task_of_row.unique().tolist():
        rows = task_of_row == task
        out[rows] = (x[rows].float() @ _masked(delta, bits, task, signed).float().T).to(x.dtype)
    return out


def _masked(delta: Tensor, bits: Tensor, task: int, signed: bool) -> Tensor:
    if task == -1:
        return delta
    bit = unpack_bits(bits[task], delta.numel()).view(delta.shape)
    return delta.where(bit, -delta if signed else torch.zeros_like(delta))
