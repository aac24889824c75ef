"""The delta's share of a linear layer for a batch whose rows belong to different tasks, without a copy of the weights per task."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from siftmasks.ops.arguments import FLOATS, expect


def masked_delta_mm(x: Tensor, delta: Tensor, bits: Tensor, task_of_row: Tensor, *, signed: bool = False) -> Tensor:
    """Multiply each row with the delta of its own task: `out_r = x_r (delta ⊙ m_t)ᵀ` with t = `task_of_row[r]`.

    A linear layer serves many tasks in one batch as `x @ baseᵀ + masked_delta_mm(x, delta, ...)`. m_t are the bits of task t, 1 or 0, or
    with `signed` 1 or -1; for t = -1, the model without a mask, it is 1 everywhere.

    Must move delta once and one bit per weight and distinct task; takes 2 n in out FLOPs. Few rows are bound by memory bandwidth, many by
    arithmetic. Kernels fuse the unpacking, the mask and the product; on a CPU, tasks of more than `numba.FEW` rows are left to the matrix
    product of the reference. Sums are float32, in an order that differs between back ends: they agree within rounding, not bit by bit.

    >>> x, delta, bits = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0b0110]], dtype=torch.uint8)
    >>> masked_delta_mm(x, delta, bits, torch.tensor([0, -1, 0]))
    tensor([[2., 3.],
            [3., 7.],
            [2., 3.]])

    Shapes: `x` [n, in], `delta` [out, in], `bits` [tasks, ceil(out * in / 8)] as in `siftmasks.bits`, `task_of_row` [n], the result
    [n, out], any strides. Dtypes: `x`, `delta` and the result share float32, bfloat16 or float16; `bits` uint8, `task_of_row` int64.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit, or a task outside [-1, tasks). On a GPU, where looking
    at the tasks would wait for them, such a task stops the device with an assertion. `delta` must be finite. There are no gradients.
    Source: SIFT-Masks, Kuo et al. 2025, §3, for a batch; BitDelta, Liu et al. 2024, for the way to serve it.
    """
    if x.ndim != 2 or delta.ndim != 2 or bits.ndim != 2 or x.dtype not in FLOATS:
        came = f"x is {x.dtype} {tuple(x.shape)}, delta {tuple(delta.shape)}, bits {tuple(bits.shape)}"
        raise ValueError(f"{came}: expected float32, bfloat16 or float16 [n, in], [out, in] and [tasks, bytes]")
    (n, width), height, tasks = x.shape, len(delta), len(bits)
    expect("delta", delta, x, x.dtype, shape=(height, width))
    expect("bits", bits, x, torch.uint8, shape=(tasks, (height * width + 7) // 8))
    expect("task_of_row", task_of_row, x, torch.int64, shape=(n,))
    if n and not x.is_cuda:
        low, high = (int(task) for task in task_of_row.aminmax())
        if low < -1 or high >= tasks:
            raise ValueError(f"task_of_row goes from {low} to {high}: expected -1 to {tasks - 1}")
    tensors = x.contiguous(), delta.contiguous(), bits.contiguous(), task_of_row.contiguous()
    with torch.no_grad():
        product: Tensor = pick(__name__, x).masked_delta_mm(*tensors, signed)
    return product
