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
        (high0, low0), (high2, low2) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of a 64-bit product, by halves of `factor` so that int64 never overflows."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    middle = lower + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (middle >> 32), middle & 0xFFFFFFFF


@cache
def table(device: torch.device) -> Tensor:
    """Return the `normal_table` on a device."""
    return torch.tensor(normal_table(), device=device)
