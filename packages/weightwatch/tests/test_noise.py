import pytest
import torch

from lmcore import random
from lmcore.checkpoint import Checkpoint
from lmcore.models import smollm2_folder
from weightwatch.noise import bound_of_variances, edge_of_rest, edge_of_sums, edge_of_variances, rounding_variance
from weightwatch.singular import top_singular_vectors


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def largest(matrix):
    return float(torch.linalg.eigvalsh(matrix @ matrix.mT)[-1].sqrt())


def drawn(shape, name):
    """Even numbers in (-1/2, 1/2)."""
    return random.uniform(0, name, shape[0] * shape[1]).reshape(shape) - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_variance_of_rounding_is_that_of_an_even_spread_over_an_ulp(dtype):
    weights = torch.tensor([1.0, -1.75, 2.0, 3.9, 2**-7], dtype=dtype)
    neighbour = torch.nextafter(weights.abs(), torch.full_like(weights, 100.0))
    ulp = (neighbour - weights.abs()).double()
    torch.testing.assert_close(rounding_variance(weights).double(), ulp**2 / 12, rtol=1e-5, atol=0)
    assert rounding_variance(torch.zeros(3, dtype=dtype)).max() < 1e-15  # an ulp of the smallest numbers


def test_a_wide_tensor_of_narrow_numbers_has_the_rounding_of_these():
    weights = drawn((40, 50), "weights")
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weights.to(dtype)
        assert torch.equal(rounding_variance(narrow.float()), rounding_variance(narrow))
    assert rounding_variance(weights).max() < 1e-12


@pytest.mark.parametrize(("d", "m"), [(64, 64), (64, 256), (300, 40)])
def test_no_draw_passes_the_edge_and_the_edge_is_near(d, m):
    variances = torch.full((d, m), 1 / 12)
    edge = edge_of_variances(variances, at_most=1e9)
    exact = 12**-0.5 * (d**0.5 + m**0.5)
    assert exact < edge < 1.15 * exact
    assert edge == pytest.approx(edge_of_sums(variances.sum(1), variances.sum(0)) / 1.05, rel=0.02)
    tops = [largest(drawn((d, m), f"draw {i}")) for i in range(100)]
    assert 0.85 * edge < max(tops) < edge


@pytest.fixture(scope="module")
def smollm2():
    with Checkpoint.open(smollm2_folder()) as checkpoint:
        yield lambda layer, name: checkpoint.tensor(f"model.layers.{layer}.{name}.weight").float()


@pytest.mark.parametrize(("layer", "name"), [(0, "self_attn.o_proj"), (29, "self_attn.o_proj"), (29, "mlp.down_proj")])
def test_rounding_of_real_weights_stays_below_the_edge(smollm2, layer, name):
    """Whose outlier weights have large errors in few rows and columns: the first of these passes the edge of the sums alone."""
    weights = smollm2(layer, name)
    ratios = []
    for i in range(8):
        fine = weights * (1 + 0.02 * drawn(weights.shape, f"{layer} {name} {i}"))
        stored = fine.bfloat16()
        edge = edge_of_variances(rounding_variance(stored), at_most=1e9)
        ratios.append(largest(stored.float() - fine) / edge)
    assert min(ratios) > 0.6
    assert max(ratios) < 1.0


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_changes_without_order_that_rounding_mostly_swallowed_stay_below_the_edge(smollm2, scale):
    """A fine-tune of a bfloat16 base moves weights by whole ulps or not at all: here 6 and 31 % of them."""
    base = smollm2(14, "self_attn.o_proj")
    ulp = (12 * rounding_variance(base.bfloat16())).sqrt()
    stored = (base + scale * ulp.mean() * random.normal(0, f"{scale}", base.numel()).view_as(base)).bfloat16()
    difference = stored.float() - base
    energy = difference.double().square()
    edge = edge_of_variances(rounding_variance(stored), at_most=edge_of_sums(energy.sum(1), energy.sum(0)))
    top = largest(difference)
    assert top < edge < 1.18 * top  # the edge of rounding alone is twice as high or more


def test_the_smaller_bound_is_taken_without_reading_more():
    variances = torch.ones(50, 50)
    assert edge_of_variances(variances, at_most=3.0) == 3.0
    assert edge_of_variances(torch.zeros(50, 50), at_most=3.0) == 0.0
    assert edge_of_sums(torch.zeros(5), torch.zeros(7)) == 0.0


@pytest.mark.parametrize(("layer", "name"), [(0, "self_attn.o_proj"), (29, "mlp.down_proj")])
def test_the_bound_of_the_sums_is_above_the_edge_but_not_far(smollm2, layer, name):
    variances = rounding_variance(smollm2(layer, name).bfloat16())
    bound = bound_of_variances(variances.sum(1).double(), variances.sum(0).double())
    edge = edge_of_variances(variances, at_most=1e9)
    assert edge < bound < 1.6 * edge
    outliers = torch.full((300, 300), 1e-4)
    outliers[:10, :10] = outliers[10:13, 10:13] = 1.0
    assert edge_of_variances(outliers, at_most=1e9) < 1.02 * bound_of_variances(outliers.sum(1), outliers.sum(0))
    assert bound_of_variances(torch.zeros(5), torch.zeros(7)) == 0.0


def test_zero_rows_and_columns_take_no_part():
    variances = torch.zeros(200, 300)
    variances[50:150, 100:200] = 2.0
    whole = edge_of_variances(variances, at_most=1e9)
    assert whole == pytest.approx(edge_of_variances(variances[50:150, 100:200], at_most=1e9), rel=0.01)


def test_unequal_variances_bound_what_their_sums_do_not():
    """Two outlier blocks on the diagonal, of which the sums make one of half the variance."""
    variances = torch.full((300, 300), 1e-4)
    variances[:10, :10] = variances[10:13, 10:13] = 1.0
    edge = edge_of_variances(variances, at_most=1e9)
    tops = [largest(drawn((300, 300), f"block {i}") * (12 * variances).sqrt()) for i in range(30)]
    assert max(tops) < edge < 1.45 * max(tops)


def test_taking_out_directions_lays_bare_the_edge_of_the_rest():
    noise = random.normal(0, "noise", 300 * 400).reshape(300, 400)
    u, v = torch.ones(300) / 300**0.5, torch.ones(400) / 400**0.5
    edges = []
    for matrix in (noise, noise + 500 * torch.outer(u, v)):
        energy = matrix.double().square()
        found = top_singular_vectors(matrix, 5)
        edges.append(edge_of_rest(energy.sum(1), energy.sum(0), found))
    assert edges[0] == pytest.approx(edges[1], rel=0.01)
    assert edges[0] == pytest.approx(300**0.5 + 400**0.5, rel=0.12)
