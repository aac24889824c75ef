"""Products with the difference of two weights, which itself is never in memory."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from weightwatch.ops.arguments import FLOATS, expect


def delta_gemm(base: Tensor, post: Tensor, right: Tensor, *, transpose: bool = False) -> Tensor:
    """Return `(post - base) @ right`, or with `transpose` `(post - base)ᵀ @ right`.

    The weights are widened to float32, subtracted (rounded once) and multiplied tile by tile, in the order in which they lie in memory,
    so they may be mapped from files of any size: a CPU widens about a megabyte of each at a time. Sums are float32, with at most as many
    roundings as a sum has terms, in an order that differs between back ends.

    Must read each weight once; takes 1 + 2 q FLOPs per weight of the difference, so that with q around 30 arithmetic takes about as long as
    memory, on a CPU as on a GPU (which does not use TF32). Fuses widening and difference with the product; the formula writes and reads
    three float32 matrices on the way.

    >>> base, post = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> delta_gemm(base, post, torch.ones(3, 1))
    tensor([[ 6.],
            [15.]])
    >>> delta_gemm(base, post, torch.ones(2, 1), transpose=True)
    tensor([[5.],
            [7.],
            [9.]])

    Shapes: `base` and `post` [rows, columns], `right` [columns, q] and the result [rows, q]; with `transpose` `right` [rows, q] and the
    result [columns, q]. Any strides. Dtypes: `base` and `post` float32, bfloat16 or float16, each its own; `right` and the result float32.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit.
    Source: the products of a randomised SVD (Halko, Martinsson and Tropp 2011) of the weight difference that WeightWatch reads, Zhong and
    Raghunathan 2025 (arXiv 2508.00161).
    """
    if post.ndim != 2 or right.ndim != 2 or post.dtype not in FLOATS:
        came = f"post is {post.dtype} {tuple(post.shape)}, right {tuple(right.shape)}"
        raise ValueError(f"{came}: expected float32, bfloat16 or float16 [rows, columns] and a matrix")
    rows, columns = post.shape
    expect("base", base, (rows, columns), post.device, *FLOATS)
    expect("right", right, (rows if transpose else columns, right.shape[1]), post.device, torch.float32)
    with torch.no_grad():
        base, post = (tensor.detach().T if transpose else tensor.detach() for tensor in (base, post))
        product: Tensor = pick(__name__, post).delta_gemm(base, post, right.detach().contiguous())
    return product
