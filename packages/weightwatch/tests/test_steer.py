"""Steering: what fires is taken out from its token on, all at once, and nothing else moves."""

import pytest
import torch

from weightwatch.ops.steer import MODES, steer

# The interpreter of Triton runs on NumPy, which tells of overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of |h|: a few units in the last place of float32, and half a unit of a result that is rounded to 16 bits.
EXACT = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
inf, nan = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def unhurried():
    """Small matrices gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "numba", "triton"])
def device(request, monkeypatch):
    """Runs a test once on each back end; returns the device of its tensors."""
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    return DEVICE if request.param == "triton" else "cpu"


class Case:
    """Rows of a few sequences in a mixed order, roles -1, 0 and 1, directions of which a few fire, and what must come of it."""

    def __init__(self, n=60, d=65, k=10, sequences=3, dtype=torch.float32, device="cpu", level=0.3, units=None, seed=0):
        generator = torch.Generator().manual_seed(100 * n + d + seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.hidden = (3 * draw(n, d)).to(dtype).to(device)
        units = torch.nn.functional.normalize(draw(k, d), dim=1) if units is None else units
        self.directions = units.to(device)
        self.low, self.high = (torch.full((2, len(units)), end, device=device) for end in (-level, level))
        self.high[1] = level * 0.8
        self.role = torch.randint(-1, 2, (n,), generator=generator).to(device)
        self.sequence = torch.randint(0, sequences, (n,), generator=generator).to(device)
        self.fired = torch.zeros(sequences, len(units), dtype=torch.bool, device=device)
        self.write = draw(n, len(units)).to(device)

    def steer(self, mode="remove", rows=slice(None), fired=None, **options):
        """Steer some of the rows; `fired` carries on from a call for earlier ones."""
        if mode == "revert":
            options.setdefault("write", self.write[rows])
        tensors = self.hidden[rows], self.directions, self.low, self.high, self.role[rows], self.sequence[rows]
        return steer(*tensors, self.fired if fired is None else fired, mode=mode, **options)

    @property
    def h(self):
        return self.hidden.cpu().double()

    @property
    def u(self):
        return self.directions.cpu().double()

    @property
    def norm(self):
        return self.h.norm(dim=1, keepdim=True)

    def masks(self, before=None):
        """Which directions are steered at each row, [n, k]: in exact arithmetic, a row at a time."""
        cosine, masks = self.h @ self.u.T / self.norm, []
        fired = torch.zeros_like(self.fired, device="cpu") if before is None else before.clone()
        for row, (r, s) in enumerate(zip(self.role.tolist(), self.sequence.tolist(), strict=True)):
            if r >= 0:
                low, high = self.low[r].cpu(), self.high[r].cpu()
                fired[s] |= (cosine[row] < low) | (cosine[row] > high)
            masks.append(fired[s].clone())
        return torch.stack(masks)


def change_in_span(case, masks, out):
    """Check that each row moved within the span of the directions steered there; return the products `u_j·h'` [n, k]."""
    steered = out.cpu().double()
    for row, mask in enumerate(masks):
        _, scales, basis = torch.linalg.svd(case.u[mask], full_matrices=False)
        basis = basis[scales > 1e-5 * scales.max()] if mask.any() else basis
        moved = steered[row] - case.h[row]
        assert (moved - basis.T @ (basis @ moved)).norm() <= EXACT[out.dtype] * case.norm[row]
        if not mask.any():
            assert torch.equal(out[row], case.hidden[row])
    return steered @ case.u.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (60, 65, 10), (33, 63, 40)])
def test_removed_directions_are_gone_and_the_rest_is_as_it_was(n, d, k, dtype, device):
    case = Case(n, d, k, dtype=dtype, device=device)
    masks = case.masks()
    assert masks.any()
    products = change_in_span(case, masks, case.steer())
    assert (products.abs() / case.norm)[masks].max() <= EXACT[dtype]
    assert torch.equal(case.fired.cpu(), torch.stack([masks[case.sequence.cpu() == s].any(0) for s in range(3)]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_mode_does_what_it_says(mode, dtype, device):
    case = Case(dtype=dtype, device=device)
    masks, along = case.masks(), case.h @ case.u.T
    out = case.steer(mode, scale=-0.5) if mode == "scale" else case.steer(mode)
    products = change_in_span(case, masks, out)
    if mode == "clamp":
        cosine = products / out.cpu().double().norm(dim=1, keepdim=True)
        role = case.role.cpu().where(case.role.cpu() >= 0, 0)  # role 0 has the wider range
        for bound, sign in ((case.low.cpu()[role], -1), (case.high.cpu()[role], 1)):
            assert (sign * (cosine - bound))[masks].max() <= 4 * EXACT[dtype] + 1e-5  # where it is settled
    else:
        target = {"remove": 0 * along, "scale": -0.5 * along, "revert": along - case.write.cpu().double()}[mode]
        assert ((products - target).abs() / case.norm)[masks].max() <= EXACT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_lands_on_the_bound_it_is_beyond_and_leaves_what_is_in_range(dtype, device):
    """Orthogonal directions: each cosine is the nearest bound, or, in its range, as it was."""
    case = Case(60, 64, 6, dtype=dtype, device=device, level=0.2, units=torch.linalg.qr(torch.randn(64, 6)).Q.T.contiguous())
    masks = case.masks()
    out = case.steer("clamp").cpu().double()
    cosine, after = case.h @ case.u.T / case.norm, out @ case.u.T / out.norm(dim=1, keepdim=True)
    role = case.role.cpu().where(case.role.cpu() >= 0, 0)
    low, high = case.low.cpu().double()[role], case.high.cpu().double()[role]
    outside = masks & ((cosine < low) | (cosine > high))
    assert outside.sum() > 5
    torch.testing.assert_close(after[outside], cosine.clamp(low, high)[outside], rtol=0, atol=4 * EXACT[dtype])
    still = ~outside.any(1)
    assert (masks.any(1) & still).any()
    assert torch.equal(out[still], case.h[still])


def test_a_bound_that_cannot_be_gone_to_is_not(device):
    """The empty range of a role without calibration: everything fires, and clamp has nowhere to go."""
    case = Case(20, 33, 4, device=device)
    case.low[0], case.high[0] = inf, -inf
    case.role[:] = 0
    assert torch.equal(case.steer("clamp"), case.hidden)
    assert case.fired[case.sequence.unique()].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_one_is_the_identity_and_scale_zero_removes(dtype, device):
    case = Case(dtype=dtype, device=device)
    assert torch.equal(case.steer("scale", scale=1.0), case.hidden)
    assert case.fired.any()
    case.fired[:] = False
    zero = case.steer("scale", scale=0.0)
    case.fired[:] = False
    assert torch.equal(zero, case.steer("remove"))


def test_revert_leaves_along_the_directions_what_the_base_model_writes(device):
    case = Case(40, 64, 5, device=device)
    before = case.h - torch.randn(40, 5).double() @ case.u  # the fine-tune writes along the directions only
    case.write = ((case.h - before) @ case.u.T).float().to(device)
    case.fired[:] = True
    torch.testing.assert_close(case.steer("revert").cpu().double(), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4, 1e-2], ids=lambda apart: f"apart by {apart}")
def test_two_matrices_may_write_along_nearly_the_same_direction(apart, mode, device):
    """The second half of the directions are those of the first, or close to them."""
    generator = torch.Generator().manual_seed(0)
    half, other = torch.randn(2, 4, 65, generator=generator)
    half = torch.nn.functional.normalize(half, dim=1)
    twin = torch.nn.functional.normalize(half + apart * torch.nn.functional.normalize(other, dim=1), dim=1)
    case = Case(d=65, level=0.25, device=device, units=torch.cat([half, twin]))
    case.write = (case.h @ case.u.T * 0.4).float().to(device)
    masks, along = case.masks(), case.h @ case.u.T
    assert masks.any(1).sum() > 20
    out = (case.steer(mode, scale=0.6) if mode == "scale" else case.steer(mode)).cpu().double()
    products = out @ case.u.T
    if mode == "clamp":
        cosine = (products / out.norm(dim=1, keepdim=True)).abs()
        assert cosine[masks].max() <= 0.25 + 1e-4
    else:
        target = along * {"remove": 0.0, "scale": 0.6, "revert": 0.6}[mode]
        assert ((products - target).abs() / case.norm)[masks].max() <= 1e-3  # what lies along their differences may stay
    assert ((out - case.h).norm(dim=1, keepdim=True) <= case.norm * 1.001).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_back_ends_agree(mode, dtype, monkeypatch):
    """Within the rounding of the result: float32 sums in another order may fall on the other side of a tie."""
    found = {}
    for backend in ("reference", "numba", "triton"):
        monkeypatch.setenv("LMCORE_BACKEND", backend)
        case = Case(70, 129, 12, dtype=dtype, level=0.2, device=DEVICE if backend == "triton" else "cpu")
        out = case.steer(mode, scale=0.3) if mode == "scale" else case.steer(mode)
        found[backend] = out.cpu().float(), case.fired.cpu()
    expected, fired = found["reference"]
    assert 0 < fired.sum() < fired.numel()
    for out, mask in (found["numba"], found["triton"]):
        assert torch.equal(mask, fired)
        torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=5e-5)


@pytest.mark.parametrize("mode", MODES)
def test_calls_for_parts_are_as_one_call(mode, device):
    """A prompt in two pieces, then row by row, as in generation with a cache."""
    case, options = Case(n=40, device=device), {"scale": 0.3} if mode == "scale" else {}
    expected = case.steer(mode, **options)
    fired = torch.zeros_like(case.fired)
    parts = [slice(0, 13), slice(13, 30), *(slice(row, row + 1) for row in range(30, 40))]
    found = torch.cat([case.steer(mode, part, fired, **options) for part in parts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(fired, case.fired)


def test_sequences_do_not_touch_each_other(device):
    """In another order of the sequences, or alone, each comes out the same."""
    case = Case(device=device)
    expected = case.steer()
    order = torch.cat([(case.sequence == s).nonzero().flatten() for s in (2, 0, 1)])
    fired = torch.zeros_like(case.fired)
    torch.testing.assert_close(case.steer(rows=order, fired=fired), expected[order], rtol=0, atol=1e-5)
    assert torch.equal(fired, case.fired)
    for s in range(3):
        rows, alone = case.sequence == s, torch.zeros_like(case.fired)
        torch.testing.assert_close(case.steer(rows=rows, fired=alone), expected[rows], rtol=0, atol=1e-5)
        assert torch.equal(alone[s], case.fired[s])
        assert not alone[torch.arange(3) != s].any()


def test_steering_begins_at_the_row_that_fires_and_lasts(device):
    hidden = torch.tensor([[0.0, 1.0], [1.0, 1.0], [9.0, 1.0], [1.0, 1.0], [1.0, 1.0]], device=device)
    role, sequence = torch.tensor([0, 0, 0, 0, -1], device=device), torch.zeros(5, dtype=torch.int64, device=device)
    fired = torch.zeros(1, 1, dtype=torch.bool, device=device)
    bound = torch.tensor([[0.9]], device=device)
    out = steer(hidden, torch.tensor([[1.0, 0.0]], device=device), -bound, bound, role, sequence, fired)
    assert out[:, 0].tolist() == [0, 1, 0, 0, 0]
    assert out[:, 1].tolist() == [1] * 5


def test_rows_without_a_role_never_fire_but_are_steered(device):
    case = Case(device=device)
    case.role[:] = -1
    assert torch.equal(case.steer(), case.hidden)
    assert not case.fired.any()
    case.fired[1, 2:4] = True
    before = case.fired.clone()
    out, mine = case.steer(), (case.sequence == 1)
    assert torch.equal(case.fired, before)
    assert torch.equal(out[~mine], case.hidden[~mine])
    products = out.cpu().double() @ case.u.T
    assert (products.abs() / case.norm)[mine.cpu()][:, 2:4].max() <= 2e-6


def test_roles_have_ranges_of_their_own(device):
    hidden = torch.eye(2, device=device).repeat(2, 1)
    low, high = torch.full((2, 2), -1.0, device=device), torch.tensor([[0.5, 1.0], [1.0, 0.5]], device=device)
    fired = torch.zeros(4, 2, dtype=torch.bool, device=device)
    role = torch.tensor([0, 0, 1, 1], dtype=torch.int8, device=device)
    steer(hidden, torch.eye(2, device=device), low, high, role, torch.arange(4, device=device), fired)
    assert fired.tolist() == [[True, False], [False, False], [False, False], [False, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_fires_a_copy_comes_out_bit_for_bit(dtype, device):
    case = Case(dtype=dtype, device=device, level=1.0)
    case.high[1] = inf
    case.hidden[0, 0], case.hidden[1, 1] = -0.0, torch.finfo(dtype).tiny / 2  # a subnormal number
    out = case.steer()
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(out.view(bits), case.hidden.view(bits))
    assert out.data_ptr() != case.hidden.data_ptr()
    assert not case.fired.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [nan, inf, "overflow"])
def test_a_row_that_is_not_finite_fires_everything_in_its_sequence(bad, mode, device):
    case, options = Case(20, 33, 4, device=device, level=inf), {"scale": 0.3} if mode == "scale" else {}
    case.hidden[11, 3] = 1e20 if bad == "overflow" else bad
    case.hidden[5] = case.hidden[11]
    case.high[1] = inf
    case.role[:], case.role[5] = 1, -1
    case.sequence[:10], case.sequence[10:] = 0, 1
    out = case.steer(mode, **options)
    assert case.fired.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    torch.testing.assert_close(out[:11], case.hidden[:11], rtol=0, atol=0, equal_nan=True)
    assert out[11].isnan().all()
    assert out[12:].isfinite().all()


def test_a_row_of_zeros_and_a_row_along_a_direction(device):
    hidden = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]], device=device)
    fired, bound = torch.ones(1, 3, dtype=torch.bool, device=device), torch.full((1, 3), 0.1, device=device)
    role = torch.zeros(2, dtype=torch.int64, device=device)
    for mode in ("remove", "clamp"):
        assert not steer(hidden, torch.eye(3, device=device), -bound, bound, role, role, fired, mode=mode).any()


def test_directions_of_zeros_are_padding(device):
    case = Case(device=device)
    expected = case.steer()
    padded = Case(device=device, units=torch.cat([case.directions.cpu(), torch.zeros(3, 65)]))
    padded.role, padded.sequence = case.role, case.sequence
    padded.fired[:, 10:] = True
    torch.testing.assert_close(padded.steer(), expected, rtol=0, atol=1e-5)
    assert torch.equal(padded.fired[:, :10], case.fired)


def test_many_rows_cross_chunks(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "numba")
    case = Case(1501, 257, 8, sequences=20, dtype=torch.bfloat16, level=0.18)
    masks = case.masks()
    assert 0.2 < masks.any(1).double().mean() < 1
    products = change_in_span(case, masks, case.steer())
    assert (products.abs() / case.norm)[masks].max() <= EXACT[torch.bfloat16]


@pytest.mark.parametrize("mode", ["remove", "revert", "clamp"])
def test_a_gram_matrix_that_is_given_and_any_strides_change_nothing(mode, device):
    case = Case(24, 48, 8, device=device)
    expected, fired = case.steer(mode), case.fired.clone()
    gram = torch.nn.Parameter((case.directions @ case.directions.T).repeat_interleave(2, 1))[:, ::2]
    across = [tensor.T.contiguous().T for tensor in (case.hidden, case.directions, case.low, case.high)]
    parameter = torch.nn.Parameter(across[0])
    rows = (tensor.repeat_interleave(2)[::2] for tensor in (case.role, case.sequence))
    mask = torch.zeros(8, 3, dtype=torch.bool, device=device).T
    write = case.write.T.contiguous().T if mode == "revert" else None
    found = steer(parameter, *across[1:], *rows, mask, mode=mode, write=write, gram=gram)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(mask, fired)
    assert torch.equal(parameter.detach(), case.hidden)
    assert not found.requires_grad


@pytest.mark.parametrize(("n", "d", "k"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_tensors(n, d, k, device):
    bound, index = torch.zeros(1, k, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    fired = torch.zeros(1, k, dtype=torch.bool, device=device)
    hidden = torch.ones(n, d, device=device)
    found = steer(hidden, torch.ones(k, d, device=device), bound - 2, bound + 2, index, index, fired)
    assert torch.equal(found, hidden)


def test_more_directions_than_a_tile_holds_are_refused(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"directions is \(129, 4\): at most 128"):
        Case(2, 4, 129, device=DEVICE).steer()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden is torch.float32 \(3,\), directions \(2, 8\)"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.float64)}, r"hidden is torch.float64 \(3, 8\)"),
        ({"directions": torch.zeros(2, 9)}, r"directions is torch.float32 \(2, 9\) on cpu: expected"),
        ({"low": torch.zeros(2, 3)}, r"low is torch.float32 \(2, 3\) on cpu: expected torch.float32 \(2, 2\)"),
        ({"high": torch.zeros(1, 2)}, r"high is torch.float32 \(1, 2\) on cpu: expected torch.float32 \(2, 2\)"),
        ({"low": torch.zeros(0, 2), "high": torch.zeros(0, 2)}, r"low is \(0, 2\): expected the ranges of at least one role"),
        ({"role": torch.zeros(3)}, r"role is torch.float32 \(3,\)"),
        ({"role": torch.tensor([0, 2, 0])}, "role goes from 0 to 2: expected -1 to 1"),
        ({"sequence": torch.zeros(4, dtype=torch.int64)}, r"sequence is torch.int64 \(4,\)"),
        ({"sequence": torch.tensor([0, -1, 0])}, "sequence goes from -1 to 0: expected 0 to 0"),
        ({"fired": torch.zeros(1, 2)}, r"fired is torch.float32 \(1, 2\) on cpu: expected torch.bool"),
        ({"fired": torch.zeros(1, 3, dtype=torch.bool)}, r"fired is torch.bool \(1, 3\)"),
        ({"mode": "erase"}, "mode is 'erase': expected remove, clamp, scale, revert"),
        ({"mode": "scale"}, "scale is None and mode 'scale'"),
        ({"mode": "scale", "scale": inf}, "scale is inf and mode 'scale'"),
        ({"scale": 1.0}, "scale is 1.0 and mode 'remove'"),
        ({"mode": "revert"}, "write is None and mode 'revert'"),
        ({"write": torch.zeros(3, 2)}, "write is given and mode 'remove'"),
        (
            {"mode": "revert", "write": torch.zeros(3, 3)},
            r"write is torch.float32 \(3, 3\) on cpu: expected torch.float32 \(3, 2\)",
        ),
        ({"gram": torch.zeros(2, 3)}, r"gram is torch.float32 \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    zeros = torch.zeros(3, dtype=torch.int64)
    given = {"hidden": torch.zeros(3, 8), "directions": torch.zeros(2, 8), "low": torch.zeros(2, 2), "high": torch.zeros(2, 2),
             "role": zeros, "sequence": zeros, "fired": torch.zeros(1, 2, dtype=torch.bool)} | changed  # fmt: skip
    with pytest.raises(ValueError, match=message):
        steer(**given)
