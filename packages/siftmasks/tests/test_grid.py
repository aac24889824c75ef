"""The grid is fixed by the configuration alone, and its step is a power of two that leaves the headroom it promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftmasks.grid import Grid


@given(st.floats(1e-9, 10), st.integers(1, 10_000), st.integers(1, 16), st.floats(0.5, 16))
def test_the_step_is_the_smallest_power_of_two_that_reaches_far_enough(learning_rate, steps, bits, headroom):
    grid = Grid.of(learning_rate, steps, bits, headroom)
    reach = headroom * learning_rate * steps
    assert math.frexp(grid.step)[0] == 0.5
    assert grid.step / 2 * 2**bits < reach <= grid.step * 2**bits


def test_an_exact_power_of_two_is_not_rounded_up():
    assert Grid.of(learning_rate=2.0**-14, steps=16, bits=8, headroom=2.0).step == 2.0**-17
    assert Grid.of(learning_rate=math.nextafter(2.0**-14, 1), steps=16, bits=8, headroom=2.0).step == 2.0**-16


def test_the_settings_of_the_paper():
    assert Grid.of(learning_rate=1e-7, steps=20) == Grid(bits=8, step=2.0**-25)
    assert Grid.of(learning_rate=1e-4, steps=20, bits=15) == Grid(bits=15, step=2.0**-22)


@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.uint8), (8, torch.uint8), (9, torch.uint16), (16, torch.uint16)])
def test_levels_fit_their_dtype(bits, dtype):
    grid = Grid(bits, 1.0)
    assert grid.level_dtype == dtype
    assert grid.largest == 2**bits - 1 <= torch.iinfo(dtype).max


@given(st.integers(1, 16), st.data())
def test_ledger_dtypes_hold_all_tasks_and_are_the_smallest_that_do(bits, data):
    max_tasks = data.draw(st.integers(1, (2**32 - 1) // (2**bits - 1)))
    sizes = [torch.uint8, torch.uint16, torch.uint32]
    for dtype, most in zip(Grid(bits, 1.0).ledger_dtypes(max_tasks), (max_tasks * (2**bits - 1), max_tasks), strict=True):
        fits = [most <= torch.iinfo(size).max for size in sizes]
        assert dtype == sizes[fits.index(True)]


@pytest.mark.parametrize("max_tasks", [0, -1, 2**32 // 255 + 1])
def test_too_many_tasks_for_any_dtype_are_refused(max_tasks):
    with pytest.raises(ValueError, match=f"max_tasks is {max_tasks}: a ledger of 8-bit levels holds 1 to 16843009 tasks"):
        Grid(8, 1.0).ledger_dtypes(max_tasks)


@pytest.mark.parametrize(("bits", "step"), [(0, 1.0), (17, 1.0), (8, 0.3), (8, 0.0), (8, -1.0), (8, math.inf), (8, 2.0**-127)])
def test_what_makes_no_grid_is_refused(bits, step):
    with pytest.raises(ValueError, match=r"bits is|step is"):
        Grid(bits, step)


@pytest.mark.parametrize(
    ("rate", "steps", "headroom"),
    [(0.0, 20, 2.0), (1e-4, 0, 2.0), (1e-4, 20, 0.0), (math.inf, 20, 2.0), (math.nan, 1, 2.0), (-1.0, -1, 2.0)],
)
def test_a_configuration_without_reach_is_refused(rate, steps, headroom):
    with pytest.raises(ValueError, match=f"learning_rate {rate}, steps {steps}, headroom {headroom}: all must be positive"):
        Grid.of(rate, steps, headroom=headroom)
