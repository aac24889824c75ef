"""Adding a task vector to the ledger, exactly, and taking it out again."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcore.dispatch import pick
from siftmasks.grid import Grid
from siftmasks.ops.arguments import FLOATS, UNSIGNED, expect, expect_in_place


def ledger_add(
    task_vector: Tensor, total: Tensor, count: Tensor, *, step: float, bits: int, positive: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Round a task vector τ to levels n, add them to the ledger in place, and return `(levels, packed bits, saturated)`.

        n = min(round_half_even(|τ| / step), 2^bits - 1),   total += n,   count += [n > 0]

    The packed bits are the mask, [n > 0]. With `positive`, the second ledger of mode "signs", they are the signs, [τ > 0], and
    `positive += n` where τ > 0. `saturated` counts the coordinates that the largest level cut short. Integers add up to the same in any
    order, on any device and in any number of parts: what is added can be taken out again (`ledger_subtract`) without a trace.

    Rounding moves 4 bytes of τ, a level and a bit per weight; adding reads them again and moves total, count and positive twice: 16 to 18
    bytes for uint8 levels, a uint32 total and a uint16 count. Two passes, because infinities must be found before anything changes; each
    fuses its comparisons, sums and packing. The limit is memory bandwidth.

    >>> total, count = torch.zeros(4, dtype=torch.uint16), torch.zeros(4, dtype=torch.uint8)
    >>> levels, mask, saturated = ledger_add(torch.tensor([0.0, -0.5, 0.25, 9.0]), total, count, step=2**-4, bits=6)
    >>> levels, total, count, mask, saturated
    (tensor([ 0,  8,  4, 63], dtype=torch.uint8), tensor([ 0,  8,  4, 63], dtype=torch.uint16),
     tensor([0, 1, 1, 1], dtype=torch.uint8), tensor([14], dtype=torch.uint8), 1)

    Shapes: all equal, any rank, and `levels`; the bits [ceil(size / 8)] as in `siftmasks.bits`.
    Dtypes: `task_vector` float32; `total` and `positive` share uint8, uint16 or uint32, `count` has its own; `levels` uint8 up to 8 bits,
    else uint16; bits uint8.
    Limit: an overflow is not looked for. There is none while at most `max_tasks` are added to the dtypes of `Grid.ledger_dtypes`.
    Raises: `ValueError` naming how many coordinates of τ are NaN or infinite (then nothing has changed), the tensor whose shape, dtype or
    device does not fit or that changes in place but is not contiguous, or a `step` or `bits` that make no `Grid`.
    Source: SIFT-Masks, Kuo et al. 2025, Algorithm 1, whose float sum is here one of integers.
    """
    _check_ledger(total, count, positive)
    expect("task_vector", task_vector, total, torch.float32)
    with torch.no_grad():
        backend, signed = pick(__name__, total), positive is not None
        levels, packed, seen = backend.quantize(task_vector.contiguous(), None, None, Grid(bits, step), signed)
        _check_finite("task_vector", seen, total)
        backend.move(levels, total, count, packed if signed else None, positive, 1)
    return levels, packed, int(seen[0])


class Quantized(NamedTuple):
    """What `quantize_difference` makes of one tensor."""

    levels: Tensor
    """n, of the tensor's shape: uint8 up to 8 bits, else uint16."""
    bits: Tensor
    """The mask [n > 0], or without a key the signs [τ > 0]: packed uint8 [ceil(size / 8)]."""
    saturated: int
    """Coordinates that the largest level cut short."""
    energy: float
    """Sum of (θ - θ0)^2 over all coordinates."""
    kept: float
    """Sum of τ^2: what the key left of it."""


def quantize_difference(
    weight: Tensor, base: Tensor | None, *, key: tuple[int, int] | None, step: float, bits: int
) -> Quantized:
    """Round the difference between a weight θ that was trained elsewhere and its base θ0 to levels n, as `ledger_add` does.

        τ = θ - θ0, and with a key 0 where τ v <= 0;   n = min(round_half_even(|τ| / step), 2^bits - 1)

    v is made of `key = lmcore.random.key(seed, name)` as in `siftmasks.signs`; without a key (mode "signs") the bits are the signs.
    `base` None is 0. Differences are float32 and rounded once: every back end gives the same levels and bits, energies (float64) differ
    in their last places.

    Reads a weight and a base, writes a level and a bit: 5.1 bytes per weight for bfloat16 and uint8. One pass instead of the two casts,
    difference, product, maximum, two norms and rounding, each with a float32 tensor, that it takes otherwise.

    >>> levels, mask, *counted = quantize_difference(torch.tensor([1.5, 2.0]), torch.ones(2), key=(0, 0), step=2**-4, bits=8)
    >>> levels, mask, counted  # the second sign is -1
    (tensor([8, 0], dtype=torch.uint8), tensor([1], dtype=torch.uint8), [0, 1.25, 0.25])

    Shapes: equal, any rank. Dtypes: `weight` and `base` each float32, bfloat16 or float16.
    Raises: `ValueError` as `ledger_add`.
    Source: SIFT-Masks, Kuo et al. 2025, §3: its projection, here of a task vector that never saw it.
    """
    expect("weight", weight, weight, *FLOATS)
    if base is not None:
        expect("base", base, weight, *FLOATS)
        base = base.contiguous()
    with torch.no_grad():
        levels, packed, seen = pick(__name__, weight).quantize(weight.contiguous(), base, key, Grid(bits, step), key is None)
    _check_finite("weight - base", seen, weight)
    return Quantized(levels, packed, int(seen[0]), seen[2], seen[3])


def ledger_add_levels(
    levels: Tensor, total: Tensor, count: Tensor, *, signs: Tensor | None = None, positive: Tensor | None = None
) -> None:
    """Add levels that exist already, in place.

        total += levels,   count += [levels > 0],   positive += levels where the bit of `signs` is 1

    >>> total, count = torch.zeros(2, dtype=torch.uint16), torch.zeros(2, dtype=torch.uint8)
    >>> ledger_add_levels(torch.tensor([0, 7], dtype=torch.uint8), total, count)
    >>> total, count
    (tensor([0, 7], dtype=torch.uint16), tensor([0, 1], dtype=torch.uint8))

    Shapes, dtypes, `signs` (packed bits, which come with `positive` and not without) and limits: as `ledger_add` has and returns them.
    Raises: `ValueError` naming the tensor that does not fit.
    """
    _check_levels(levels, total, count, signs, positive)
    with torch.no_grad():
        pick(__name__, total).move(levels.contiguous(), total, count, signs, positive, 1)


def ledger_subtract(
    levels: Tensor, total: Tensor, count: Tensor, *, signs: Tensor | None = None, positive: Tensor | None = None
) -> int:
    """Undo `ledger_add_levels` in place, unless that would underflow somewhere: return at how many coordinates; if any, nothing changes.

    A coordinate underflows where `levels > total`, or `levels > 0` and the count is 0; with `positive`, also where the level is more than
    what tasks of its sign have added (`positive` or `total - positive`). The ledger only grows as tasks are added, so an underflow proves
    that these levels never were. That there is none does not prove that they were: compare commitments first.

    Reads a level and the ledger to look for underflows, then moves what `ledger_add_levels` does.

    >>> total, count = torch.tensor([3, 7], dtype=torch.uint16), torch.tensor([1, 1], dtype=torch.uint8)
    >>> ledger_subtract(torch.tensor([4, 7], dtype=torch.uint8), total, count), total
    (1, tensor([3, 7], dtype=torch.uint16))
    >>> ledger_subtract(torch.tensor([0, 7], dtype=torch.uint8), total, count), total, count
    (0, tensor([3, 0], dtype=torch.uint16), tensor([1, 0], dtype=torch.uint8))

    Shapes and dtypes: as for `ledger_add_levels`. Raises: `ValueError` naming the tensor that does not fit.
    """
    _check_levels(levels, total, count, signs, positive)
    with torch.no_grad():
        backend, levels = pick(__name__, total), levels.contiguous()
        underflows: int = backend.underflows(levels, total, count, signs, positive)
        if not underflows:
            backend.move(levels, total, count, signs, positive, -1)
    return underflows


def _check_finite(name: str, seen: list[float], like: Tensor) -> None:
    if seen[1]:
        raise ValueError(f"{name} holds {int(seen[1])} of {like.numel()} coordinates that are NaN or infinite")


def _check_levels(levels: Tensor, total: Tensor, count: Tensor, signs: Tensor | None, positive: Tensor | None) -> None:
    _check_ledger(total, count, positive)
    expect("levels", levels, total, torch.uint8, torch.uint16)
    if (signs is None) != (positive is None):
        raise ValueError("signs and positive come together: the bits say what of the levels goes to positive")
    if signs is not None:
        expect("signs", signs, total, torch.uint8, shape=((total.numel() + 7) // 8,))


def _check_ledger(total: Tensor, count: Tensor, positive: Tensor | None) -> None:
    expect_in_place("total", total, total, *UNSIGNED)
    expect_in_place("count", count, total, *UNSIGNED)
    if positive is not None:
        expect_in_place("positive", positive, total, total.dtype)
