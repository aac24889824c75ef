"""Random numbers that are a function of (seed, name, flat index): any range, in any order, on any device, the same bits.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") makes four words of a key, a hash of the seed and a
tensor's name, and a 64-bit counter: word i is lane i % 4 of counter i // 4. Number i is made of word i, sign i of a bit of word i // 32.
Draws of one name share words: independent ones need different names. Importing this does not import torch, nor does filling an array.
"""

from functools import cache
from hashlib import blake2b
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from lmcore.dispatch import pick

if TYPE_CHECKING:
    import torch

DTYPES = {"random_bits": "uint32", "uniform": "float32", "normal": "float32"}


def random_bits(seed: int, name: str, size: int, *, start: int = 0, device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return words `start` to `start + size`: uint32 [size]. torch computes little in uint32: convert to int64."""
    return _draw("random_bits", seed, name, size, start, device)


def signs(seed: int, name: str, size: int, *, start: int = 0, device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return signs `start` to `start + size`: sign i is 1 where bit i % 32 of word i // 32 is set, else -1: int8 [size].

    >>> signs(0, "lm_head.weight", 5)
    tensor([ 1, -1,  1,  1, -1], dtype=torch.int8)
    """
    import torch

    skip = start % 32
    words = random_bits(seed, name, (skip + size + 31) // 32, start=start // 32, device=device)
    bits = words.view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.flatten()[skip : skip + size].to(torch.int8) * 2 - 1


def uniform(seed: int, name: str, size: int, *, start: int = 0, device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return the upper 24 bits of the word times 2^-24, in [0, 1): float32 [size]."""
    return _draw("uniform", seed, name, size, start, device)


def normal(seed: int, name: str, size: int, *, start: int = 0, device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return standard normal numbers, float32 [size]: `T[i] + (T[i + 1] - T[i]) * f`, each operation rounded to float32.

    `T` is `normal_table()`, `i` the word's upper 16 bits, `f` its lower 16 over 65536. Mean 0 within 2e-9, variance 1 within 1e-9, fourth
    moment 2.9999; the distribution function is right within 2.4e-6; |x| <= 4.5793, which a normal number exceeds with probability 4.7e-6.
    """
    return _draw("normal", seed, name, size, start, device)


def fill(out: "np.ndarray | torch.Tensor", kind: str, seed: int, name: str, start: int = 0) -> None:
    """Overwrite `out` [size] by what the function called `kind` returns. Raises `ValueError` for another rank or dtype or `start` < 0."""
    if start < 0 or out.ndim != 1 or str(out.dtype).removeprefix("torch.") != DTYPES[kind]:
        raise ValueError(f"{kind} needs start >= 0, not {start}, and out {DTYPES[kind]} [size], not {out.dtype} {[*out.shape]}")
    pick(__name__, out).fill(out, kind, key(seed, name), start)


def key(seed: int, name: str) -> tuple[int, int]:
    """Return the key words: 8 bytes of BLAKE2b over the seed (8 bytes, so 0 <= `seed` < 2^64) and name (UTF-8), all little-endian."""
    digest = blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@cache
def normal_table() -> np.ndarray:
    """Return the normal quantiles of i / 65536, float32 [65537], with finite ends that make the variance of `normal` 1."""
    q = np.array([NormalDist().inv_cdf(i / 65536) for i in range(32768, 65536)])
    # Between a and b x² averages (a² + ab + b²) / 3. The outermost b makes this 1 over all 32768 bins of a side.
    missing = 3 * 32768 - np.sum(q[:-1] ** 2 + q[:-1] * q[1:] + q[1:] ** 2)
    upper = np.append(q, ((4 * missing - 3 * q[-1] ** 2) ** 0.5 - q[-1]) / 2).astype(np.float32)
    table = np.concatenate([-upper[:0:-1], upper])
    table.flags.writeable = False  # all callers share it
    return table


def _draw(kind: str, seed: int, name: str, size: int, start: int, device: "torch.device | str") -> "torch.Tensor":
    import torch

    out = torch.empty(size, dtype=getattr(torch, DTYPES[kind]), device=device)
    fill(out, kind, seed, name, start)
    return out
