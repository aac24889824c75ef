"""The difference of two weights and its sums: those of exact arithmetic on both back ends, and the same difference bit for bit."""

import pytest
import torch

from weightwatch.noise import rounding, rounding_variance
from weightwatch.ops.difference_sums import difference_sums, numba, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {"rtol": 1e-6, "atol": 0.0}  # a float32 is squared, then all is float64


def weights(rows, columns, dtypes, scale=1e-3):
    generator = torch.Generator().manual_seed(rows + columns)
    base = torch.randn(rows, columns, generator=generator) * 0.02
    changed = torch.rand(rows, columns, generator=generator) < 0.5
    post = base + scale * torch.randn(rows, columns, generator=generator) * changed
    return base.to(dtypes[0]), post.to(dtypes[1])


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("post", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_sums_are_those_of_exact_arithmetic(base, post, backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    before, after = weights(37, 130, (base, post))
    found = difference_sums(before, after, (None, None), rounding(after))
    delta = after.double() - before.double()
    variance = rounding_variance(after).double()
    squares = [one.double().square() for one in (before, after, delta)]
    assert torch.equal(found.delta, after.float() - before.float())
    torch.testing.assert_close(found.rows, torch.stack([*(one.sum(1) for one in squares), variance.sum(1)]), **CLOSE)
    torch.testing.assert_close(found.columns, torch.stack([squares[2].sum(0), variance.sum(0)]), **CLOSE)
    assert found.changed == int((delta != 0).sum())


@pytest.mark.parametrize("with_base", [True, False], ids=["pair", "alone"])
@pytest.mark.parametrize("gains", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_back_ends_give_the_same_difference_whatever_the_gains_and_the_layout(dtype, across, gains, with_base):
    before, after = weights(64, 33, (dtype, dtype))
    if across:
        before, after = before.mT.contiguous().mT, after.mT.contiguous().mT
    scales = tuple(torch.linspace(0.5, 2 + i, 64) if given else None for i, given in enumerate(gains))
    how = rounding(after)
    one, other = (back.difference_sums(before if with_base else None, after, scales, how) for back in (numba, reference))
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], **CLOSE)
    torch.testing.assert_close(one[2], other[2], **CLOSE)
    assert one[3] == other[3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["base", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_no_number_makes_the_squares_of_its_row_none(dtype, side, value):
    pair = weights(8, 40, (dtype, dtype))
    pair[side][5, 17] = value
    finite = difference_sums(*pair, (None, None), (2.0**-126, 2.0**-7)).rows[side].isfinite()
    assert finite.tolist() == [i != 5 for i in range(8)]


def test_float64_is_subtracted_in_float64():
    base = torch.ones(2, 3, dtype=torch.float64)
    found = difference_sums(base, base + 2.0**-40, (None, None), (2.0**-126, 2.0**-52))
    assert torch.equal(found.delta, torch.full((2, 3), 2.0**-40))


def test_tensors_that_do_not_fit_are_named():
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"base is torch\.float32 \(3, 2\)"):
        difference_sums(one.mT, one, (None, None), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"gain of post is torch\.float32 \(3,\)"):
        difference_sums(one, one, (None, torch.ones(3)), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"post is torch\.int64"):
        difference_sums(None, one.long(), (None, None), (0.0, 1.0))
