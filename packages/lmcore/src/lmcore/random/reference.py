"""Philox4x32-10 in plain torch: a word is an int64 below 2^32."""

from functools import cache

import torch
from torch import Tensor

from lmcore.random import normal_table


def fill(out: Tensor, kind: str, key: tuple[int, int], start: int) -> None:
    """Overwrite `out` with the numbers from flat index `start` on."""
    counter = torch.arange(start // 4, (start + len(out) + 3) // 4, device=out.device)
    lanes = philox(*key, counter & 0xFFFFFFFF, counter >> 32, counter * 0, counter * 0)
    word = torch.stack(lanes, dim=1).flatten()[start % 4 :][: len(out)]
    if kind == "random_bits":
        out.copy_(word)
    elif kind == "uniform":
        out.copy_((word >> 8).float() * 2**-24)
    else:
        low, high = table(out.device)[word >> 16], table(out.device)[(word >> 16) + 1]
        out.copy_(low + (high - low) * ((word & 0xFFFF).float() * 2**-16))


def philox(k0: int, k1: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words that ten rounds make of a key of two words and counters of four."""
    for _ in range(10):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around: the 64 bits are right, the uppermost is its sign
        c0, c1 = (p2 >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, p2 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32 & 0xFFFFFFFF) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@cache
def table(device: torch.device) -> Tensor:
    """Return the `normal_table` on a device."""
    return torch.tensor(normal_table(), device=device)
