"""The sign vector of a key, as the references of several ops read it."""

import torch
from torch import Tensor

from lmcore.random import reference


def signs(key: tuple[int, int], shape: torch.Size, device: torch.device) -> Tensor:
    """Return +1 where bit `i % 32` of word `i // 32` is set, else -1: int8 of `shape`."""
    words = torch.empty((shape.numel() + 31) // 32, dtype=torch.int64, device=device)
    reference.fill(words, "random_bits", key, 0)
    bits = words[:, None] >> torch.arange(32, device=device) & 1
    return (bits.flatten()[: shape.numel()] * 2 - 1).to(torch.int8).view(shape)
