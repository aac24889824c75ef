"""The sign vector that all tasks share: drawn once, before any training, from a seed; stored nowhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcore.random import signs


def sign_vector(seed: int, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the sign vector v of one tensor: +1 or -1 per coordinate, each with probability 1/2, int8 of `shape`.

    A function of the seed, the tensor's name in the checkpoint and the flat index alone, the same bits on every device: coordinate i is +1
    where bit `i % 32` of word `i // 32` of `lmcore.random.random_bits(seed, name)` is set. The kernels draw the same signs from
    `key = lmcore.random.key(seed, name)` as they go, so that v moves no bytes.

    >>> sign_vector(0, "lm_head.weight", (2, 3))
    tensor([[ 1, -1,  1],
            [ 1, -1, -1]], dtype=torch.int8)

    Source: SIFT-Masks, Kuo et al. 2025, §3 (Algorithm 1 prints {0, 1}; its text and Figure 2 have -1 and 1).
    """
    return signs(seed, name, torch.Size(shape).numel(), device=device).view(torch.Size(shape))
