import pytest
import torch

from weightwatch.singular import TOLERANCE, BlockKrylov, top_singular_vectors


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix_with(values, d, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q for side in (d, m))
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.mT).float()


def power_law(count, exponent):
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


@pytest.mark.parametrize(("d", "m"), [(300, 300), (300, 801), (801, 300)])
@pytest.mark.parametrize("exponent", [0.3, 0.7, 2.0])
def test_vectors_agree_with_a_full_decomposition_and_the_certificate_bounds_their_error(d, m, exponent):
    matrix = matrix_with(power_law(min(d, m), exponent), d, m)
    found = top_singular_vectors(matrix, 10)
    u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert found.method == "krylov"
    assert ((found.left.double() @ u[:, :10]) ** 2).sum() / 10 > 0.9999
    assert ((found.values - values[:10]).abs() <= found.residuals + 1e-6 * values[0]).all()
    assert (found.residuals <= TOLERANCE * found.values).all()
    for i in range(10):
        gap = (values - found.values[i]).abs()[torch.arange(len(values)) != i].min()
        cosine = (found.left[i].double() @ u[:, i]).abs().clamp(max=1)
        assert (1 - cosine**2).sqrt() <= (2**0.5 * found.residuals[i] + 1e-6) / gap + 1e-3
    torch.testing.assert_close(found.left.norm(dim=1), torch.ones(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.left @ matrix, found.right * found.values[:, None].float(), atol=1e-5, rtol=0)


def test_a_residual_is_what_it_says():
    matrix = matrix_with(power_law(400, 0.5), 400, 500)
    found = top_singular_vectors(matrix, 6, floor=1e9)  # so that the first depth will do
    left, right, values = found.left.double(), found.right.double(), found.values[:, None]
    squares = (right @ matrix.double().mT - values * left).norm(dim=1) ** 2 + (left @ matrix.double() - values * right).norm(
        dim=1
    ) ** 2
    torch.testing.assert_close(found.residuals, (squares / 2).sqrt(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("last", [0.5, 1 / 30, 1 / 40, 1e-3, 1e-4])
def test_a_residual_is_what_it_says_however_fast_the_values_fall(last):
    """Up to a ratio it is made of products that were there, whose rounding a residual made of them does not see."""
    matrix = matrix_with(torch.logspace(0, torch.tensor(last).log10(), 12), 400, 500)
    found = top_singular_vectors(matrix, 12, floor=0.6 * last)
    missing = found.right.double() @ matrix.double().mT - found.values[:, None] * found.left.double()
    assert found.method == "krylov"
    assert (missing.norm(dim=1) / 2**0.5 - found.residuals <= 1e-5 * found.values).all()


@pytest.mark.parametrize("rank", [3, 12, 20, 30])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-4], ids=str)
def test_the_basis_stays_orthogonal_after_it_holds_all_there_is(rank, rest):
    """As of a merged adapter: what follows then is rounding."""
    iteration = BlockKrylov(matrix_with([*torch.linspace(1, 0.01, rank), *[rest] * 100], 300, 400), 20)
    found = iteration.until(0.005)
    basis = iteration._basis[: iteration._size].double()
    assert found.method == "krylov"
    assert (basis @ basis.mT - torch.eye(len(basis))).abs().max() < 1e-5
    torch.testing.assert_close(found.values[: min(rank, 20)], torch.linspace(1, 0.01, rank).double()[:20], rtol=1e-4, atol=0)


def test_the_iteration_goes_on_where_it_stopped():
    noise = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) / 2 / 512**0.5
    iteration = BlockKrylov(noise + matrix_with([5.0, 3.0, 2.0], 512, 512), 20)
    coarse = iteration.until(1.1)
    assert iteration.until(1.5) is coarse
    assert coarse.certified(1.1)
    assert not coarse.certified(0.0)
    assert iteration.until(0.0).certified(0.0)


def test_the_same_seed_and_name_give_the_same_bits_and_others_the_same_vectors():
    matrix = matrix_with(power_law(400, 0.7), 400, 600)
    first, second = (top_singular_vectors(matrix, 8, seed=3, name="a") for _ in range(2))
    other = top_singular_vectors(matrix, 8, seed=3, name="b")
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.left, other.left)
    torch.testing.assert_close((first.left * other.left).sum(1), torch.ones(8), atol=1e-4, rtol=0)  # signs, too


def test_a_value_a_hundred_thousand_times_smaller_than_the_first_is_found():
    matrix = matrix_with([1.0, 1e-5, 1e-9], 400, 400)
    found = top_singular_vectors(matrix, 2, floor=1e-6)
    u = torch.linalg.svd(matrix.double()).U
    torch.testing.assert_close(found.values, torch.tensor([1.0, 1e-5], dtype=torch.float64), rtol=1e-3, atol=0)
    assert (found.left[1].double() @ u[:, 1]).abs() > 0.9999


@pytest.mark.parametrize("shape", [(400, 500), (7, 5), (5, 7), (1, 9), (9, 1)])
def test_degenerate_matrices_have_their_exact_values(shape):
    zero = torch.zeros(shape)
    assert not top_singular_vectors(zero, 20).values.any()
    zero[shape[0] - 1, 0] = -3.0
    found = top_singular_vectors(zero, 20)
    assert found.values[0] == pytest.approx(3.0)
    assert not found.values[1:].any()
    assert len(found.values) == min(20, *shape)
    assert abs(found.left[0, shape[0] - 1]) == pytest.approx(1.0)
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()


def test_equal_singular_values_are_certified_though_their_vectors_are_not_unique():
    matrix = matrix_with(torch.ones(400), 400, 400)
    found = top_singular_vectors(matrix, 5)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix.double())[:5], atol=1e-5, rtol=0)
    assert found.certified(0.0)


def test_noise_is_not_resolved_below_the_floor():
    noise = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) / 2 / 512**0.5
    matrix = noise + matrix_with([5.0, 3.0, 2.0], 512, 512)
    coarse, fine = top_singular_vectors(matrix, 20, floor=1.1), top_singular_vectors(matrix, 20)
    assert not coarse.certified(0.0)
    assert coarse.certified(1.1)
    assert fine.certified(0.0)
    assert (fine.values > 1.1).sum() == (coarse.values > 1.1).sum() == 3
    torch.testing.assert_close((fine.left[:3] * coarse.left[:3]).sum(1), torch.ones(3), atol=1e-5, rtol=0)


def test_the_gram_matrix_answers_where_the_iteration_cannot(monkeypatch):
    small, large = matrix_with(power_law(90, 0.3), 90, 200), matrix_with(power_law(300, 0.3), 400, 300)
    assert top_singular_vectors(small, 5).method == "gram"  # the basis would hold half of all dimensions at once
    monkeypatch.setattr("weightwatch.singular.TOLERANCE", 1e-9)
    assert top_singular_vectors(large, 5).method == "gram"  # it comes to hold half of them
    for matrix in (small, large):
        found = top_singular_vectors(matrix, 5)
        u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        torch.testing.assert_close(found.values, values[:5], rtol=1e-7, atol=0)
        torch.testing.assert_close((found.left.double() @ u[:, :5]).diagonal().abs(), torch.ones(5, dtype=torch.float64))


def test_no_vectors_are_refused():
    with pytest.raises(ValueError, match="k = 0 singular vectors"):
        top_singular_vectors(torch.ones(3, 3), 0)
