"""Adding a task vector to the ledger, exactly, and taking it out again."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from siftmasks.grid import Grid
from siftmasks.ops.arguments import UNSIGNED, expect, expect_in_place


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
        backend = pick(__name__, total)
        levels, packed, saturated, not_finite = backend.quantize(
            task_vector.contiguous(), Grid(bits, step), positive is not None
        )
        if not_finite:
            raise ValueError(f"task_vector holds {not_finite} of {total.numel()} coordinates that are NaN or infinite")
        backend.move(levels, total, count, packed if positive is not None else None, positive, 1)
    return levels, packed, saturated


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
