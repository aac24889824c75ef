"""The extremes of cosines: right in exact arithmetic, at the first row that has them, and never silent about what is not finite."""

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightwatch.ops.cos_minmax import cos_minmax

# The interpreter of Triton runs on NumPy, which tells of overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "numba", "triton"]
inf, nan = float("inf"), float("nan")


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    """Runs a test once on each back end; returns the device of its tensors."""
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    return DEVICE if request.param == "triton" else "cpu"


def states(n, d, k, *, layers=(), groups=3, dtypes=(torch.float32, torch.float32), device="cpu"):
    """Return hidden states with the huge channel that real ones have, unit directions and groups, -1 among them."""
    generator = torch.Generator().manual_seed(7 * n + d)
    hidden = torch.randn(*layers, n, d, generator=generator)
    hidden[..., :1] += 30
    directions = torch.nn.functional.normalize(torch.randn(*layers, k, d, generator=generator), dim=-1)
    group = torch.randint(-1, groups, (n,), generator=generator)
    return hidden.to(dtypes[0]).to(device), directions.to(dtypes[1]).to(device), group.to(device)


def exact_cosines(hidden, directions):
    hidden, directions = hidden.cpu().double(), directions.cpu().double()
    return hidden @ directions.mT / hidden.norm(dim=-1, keepdim=True)


def check(hidden, directions, group, groups):
    """Compare with float64: extremes within rounding, at rows of the group whose cosines are within rounding of the extreme."""
    found = cos_minmax(hidden, directions, group, groups)
    low, high, low_at, high_at = (part.cpu() for part in found)
    cosine, group = exact_cosines(hidden, directions), group.cpu()
    assert low.dtype == high.dtype == torch.float32
    assert low_at.dtype == high_at.dtype == torch.int64
    assert low.shape == (*directions.shape[:-2], groups, directions.shape[-2])
    for g in range(groups):
        rows = cosine[..., group == g, :]
        for extreme, at, exact in ((low, low_at, rows.amin), (high, high_at, rows.amax)):
            if not rows.shape[-2]:
                assert (extreme[..., g, :].abs() == inf).all()
                assert (at[..., g, :] == -1).all()
                continue
            torch.testing.assert_close(extreme[..., g, :].double(), exact(-2), rtol=0, atol=2e-6)
            assert (group[at[..., g, :]] == g).all()
            there = cosine.gather(-2, at[..., g, :].unsqueeze(-2)).squeeze(-2)
            torch.testing.assert_close(there, exact(-2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (1, 63, 40), (17, 64, 3), (131, 65, 41), (63, 129, 70)])
def test_extremes_are_those_of_exact_arithmetic(n, d, k, dtypes, device):
    check(*states(n, d, k, dtypes=dtypes, device=device), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layers", "n", "d"), [(3, 1, 65), (2, 19, 33)])
def test_layers_go_together(layers, n, d, dtype, device):
    tensors = states(n, d, 20, layers=(layers,), dtypes=(dtype, dtype), device=device)
    check(*tensors, 3)
    together = cos_minmax(*tensors, 3)
    for layer in range(layers):
        alone = cos_minmax(tensors[0][layer], tensors[1][layer], tensors[2], 3)
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part, whole[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_many_rows_cross_chunks_and_threads(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    check(*states(5001, 576, 40), 3)
    check(*states(701, 576, 40, layers=(2,), dtypes=(torch.bfloat16, torch.float32)), 3)


def test_of_equals_the_first_row_is_named(device):
    """Powers of two and sums of two of them are exact in any order, so that equal rows have equal cosines on every back end."""
    rows = torch.tensor([[1.0, 0, 0], [0, 2, 0], [4, 0, 0], [0, -1, 0], [0, -2, 0], [0, 1, 0], [0, 0, 8]])
    hidden = rows.repeat_interleave(11, 0).to(device)
    group = torch.zeros(77, dtype=torch.int64, device=device)
    group[0] = -1
    low, high, low_at, high_at = cos_minmax(hidden, torch.eye(3, device=device), group, 1)
    assert torch.equal(low.cpu(), torch.tensor([[0.0, -1, 0]]))
    assert torch.equal(high.cpu(), torch.tensor([[1.0, 1, 1]]))
    assert torch.equal(low_at.cpu(), torch.tensor([[11, 33, 1]]))
    assert torch.equal(high_at.cpu(), torch.tensor([[1, 11, 66]]))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 1.0]), st.integers(-1, 2)), max_size=70), st.sampled_from(BACKENDS))
def test_groups_are_kept_apart_in_any_arrangement(rows, backend):
    """The second coordinate, exact for these rows, is told by the sign of the first number."""
    hidden = torch.tensor([[1.0 - abs(sign), sign] for sign, _ in rows]).view(-1, 2)
    group = torch.tensor([g for _, g in rows], dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCORE_BACKEND", backend)
        device = DEVICE if backend == "triton" else "cpu"
        found = cos_minmax(hidden.to(device), torch.tensor([[0.0, 1.0]], device=device), group.to(device), 3)
    for g in range(3):
        mine = [(sign, row) for row, (sign, one) in enumerate(rows) if one == g]
        expected = [(inf, -1), (-inf, -1)]
        if mine:
            expected = [min(mine), max(mine, key=lambda pair: (pair[0], -pair[1]))]
        assert [(x[g].item(), at[g].item()) for x, at in ((found.low, found.low_at), (found.high, found.high_at))] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [nan, inf, -inf, "overflow"])
def test_a_row_that_is_not_finite_shows_in_its_group_and_only_there(bad, dtype, device):
    if bad == "overflow" and dtype is torch.float16:
        pytest.skip("float16 numbers have float32 squares")
    hidden, directions, _ = states(40, 65, 20, dtypes=(dtype, dtype), device=device)
    hidden[[17, 31], 3] = 1e20 if bad == "overflow" else bad
    group = torch.arange(40, device=device) % 2
    low, high, low_at, high_at = cos_minmax(hidden, directions, group, 3)
    assert low[1].isnan().all()
    assert high[1].isnan().all()
    assert (low_at[1] == 17).all()
    assert (high_at[1] == 17).all()
    clean = cos_minmax(hidden, directions, group.where(group == 0, -1), 3)
    for part, alone in zip((low, high, low_at, high_at), clean, strict=True):
        assert torch.equal(part[[0, 2]], alone[[0, 2]])
    assert low[0].isfinite().all()


def test_rows_that_are_left_out_may_hold_anything_and_zeros_have_cosine_zero(device):
    hidden, directions, group = states(20, 33, 5, device=device)
    group[:4] = torch.tensor([-1, -1, 0, 0])
    group[4:] = 1
    hidden[0], hidden[1], hidden[2], hidden[3] = nan, inf, 0, 0
    low, high, low_at, _ = cos_minmax(hidden, directions, group, 2)
    assert not low[0].any()
    assert not high[0].any()
    assert (low_at[0] == 2).all()
    assert low.isfinite().all()


@pytest.mark.parametrize(("n", "d", "k", "groups"), [(0, 5, 3, 2), (4, 5, 0, 2), (4, 5, 3, 0), (4, 0, 3, 2)])
def test_empty_tensors(n, d, k, groups, device):
    group = torch.full((n,), min(0, groups - 1), device=device)
    low, high, low_at, high_at = cos_minmax(torch.ones(n, d, device=device), torch.ones(k, d, device=device), group, groups)
    assert low.shape == high.shape == low_at.shape == high_at.shape == (groups, k)
    if not n:
        assert (low == inf).all()
        assert (high == -inf).all()
        assert (low_at == -1).all()
    elif not d:
        assert not low[0].any()


def test_inputs_may_have_any_strides_and_stay_as_they_are(device):
    hidden, directions, group = states(24, 48, 12, device=device)
    expected = cos_minmax(hidden, directions, group, 3)
    across = torch.nn.Parameter(hidden.T.contiguous().T)
    found = cos_minmax(across, directions.T.contiguous().T, group.repeat_interleave(2)[::2], 3)
    assert all(torch.equal(part, other) for part, other in zip(found, expected, strict=True))
    assert torch.equal(across.detach(), hidden)


def test_the_number_of_threads_changes_nothing():
    tensors, before, found = states(3000, 200, 40), numba.get_num_threads(), []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            found.append(cos_minmax(*tensors, 3))
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(part, other) for part, other in zip(found[0], found[-1], strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden is torch.float32 \(3,\), directions \(2, 8\): expected"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.float64)}, r"hidden is torch.float64 \(3, 8\)"),
        ({"hidden": torch.zeros(1, 3, 8)}, r"hidden is torch.float32 \(1, 3, 8\), directions \(2, 8\): expected"),
        ({"directions": torch.zeros(2, 9)}, r"directions is torch.float32 \(2, 9\) on cpu: expected .* \(2, 8\) on cpu"),
        ({"group": torch.zeros(4, dtype=torch.int64)}, r"group is torch.int64 \(4,\) on cpu: expected torch.int64 \(3,\)"),
        ({"group": torch.zeros(3, dtype=torch.int32)}, r"group is torch.int32 \(3,\)"),
        ({"group": torch.tensor([0, 1, 2])}, "group goes from 0 to 2: expected -1 to 1"),
        ({"group": torch.tensor([0, -2, 1])}, "group goes from -2 to 1: expected -1 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"hidden": torch.zeros(3, 8), "directions": torch.zeros(2, 8), "group": torch.zeros(3, dtype=torch.int64)} | changed
    with pytest.raises(ValueError, match=message):
        cos_minmax(**given, groups=2)
