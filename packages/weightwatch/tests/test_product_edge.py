"""The edge of variances of rank one: an upper bound by its own inequalities, and the same on both back ends."""

import pytest
import torch

from weightwatch.ops.product_edge import numba, product_edge, reference


def sums(d, m, power):
    """Sums over rows and columns that are the more unequal, the higher the power."""
    generator = torch.Generator().manual_seed(d + m)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) ** power + 1e-9 for n in (d, m))
    return rows, columns * (rows.sum() / columns.sum())


@pytest.mark.parametrize("power", [0, 1, 8])
@pytest.mark.parametrize(("d", "m"), [(1, 1), (1, 50), (64, 64), (300, 1000)])
def test_the_kernel_finds_what_the_reference_finds(d, m, power):
    rows, columns = sums(d, m, power)
    assert numba.product_edge(rows, columns) == pytest.approx(reference.product_edge(rows, columns), rel=1e-9)


@pytest.mark.parametrize(("d", "m"), [(100, 100), (100, 900)])
def test_equal_variances_have_the_edge_of_marchenko_and_pastur(d, m):
    edge, _ = product_edge(torch.full((d,), float(m)).double(), torch.full((m,), float(d)).double())
    assert edge == pytest.approx(d**0.5 + m**0.5, rel=1e-4)


@pytest.mark.parametrize("power", [0, 1, 8])
def test_the_edge_is_that_of_a_large_matrix_of_noise(power):
    rows, columns = sums(500, 800, power)
    noise = torch.randn(500, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = noise * (torch.outer(rows, columns) / rows.sum()).sqrt()
    assert product_edge(rows, columns)[0] == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=0.05)


def test_sums_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"columns is torch\.float32"):
        product_edge(torch.ones(3).double(), torch.ones(3))
