"""The served weights: the same bits from every back end, right in exact arithmetic, and rounded once."""

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.random import key
from siftmasks.bits import pack_bits, unpack_bits
from siftmasks.grid import Grid
from siftmasks.ops.apply_mask import apply_mask
from siftmasks.ops.ledger_add import ledger_add
from siftmasks.signs import sign_vector

# The interpreter of Triton runs on NumPy, which tells of overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32]
KEY = key(0, "weight")
STEP = 2.0**-10
DTYPES = list(
    zip(FLOATS, [*FLOATS[1:], None], UNSIGNED, [*UNSIGNED[1:], torch.uint8], strict=True)
)  # base, result, total, count
MODES = ["sift", "sift without a mask", "signs", "signs without a mask"]
SCALES = ["mean", "count"]


def store(size, total=torch.uint16, count=torch.uint8, seed=0):
    """Return base, total, count, positive and bits of a made-up store."""
    generator = torch.Generator().manual_seed(size + seed)
    used = torch.randint(0, 6, (size,), generator=generator)  # a sixth of the coordinates is used by no task
    levels = torch.randint(0, torch.iinfo(total).max + 1, (size,), generator=generator) * (used > 0)
    up = (levels * torch.rand(size, generator=generator, dtype=torch.float64)).long()
    packed = pack_bits(torch.rand(size, generator=generator) < 0.5)
    base = torch.randn(size, generator=generator)
    return base, levels.to(total), used.to(count), up.to(total), packed


def serve(made, mode, scale, dtype=None, device="cpu"):
    base, total, count, positive, packed = (tensor.to(device) for tensor in made)
    options = {"scale": 1 / 3} if scale == "mean" else {"count": count}
    if mode.startswith("sift"):
        options["key"] = KEY
    elif mode == "signs without a mask":
        options["positive"] = positive
    return apply_mask(base, total, None if mode.endswith("mask") else packed, step=STEP, dtype=dtype, **options)


def exactly(made, mode, scale):
    """Return delta in float64."""
    base, total, count, positive, packed = made
    levels = total.double() if mode != "signs without a mask" else 2 * positive.double() - total.double()
    magnitude = levels * STEP / 3 if scale == "mean" else levels * STEP / count.double().clamp(min=1) * (count.int() > 0)
    bit = unpack_bits(packed, len(base)).double()
    sign = sign_vector(0, "weight", base.shape).double()
    return magnitude * {"sift": sign * bit, "sift without a mask": sign, "signs": 2 * bit - 1, "signs without a mask": 1}[mode]


def bits(tensor):
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 63, 4096, 5001])
def test_back_ends_are_bit_equal_to_the_reference(size, dtypes, mode, scale, backend, monkeypatch):
    base_dtype, dtype, total, count = dtypes
    base, *rest = store(size, total, count)
    made = base.to(base_dtype), *rest
    monkeypatch.setenv("LMCORE_BACKEND", "reference")
    expected = serve(made, mode, scale, dtype)
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    found = serve(made, mode, scale, dtype, "cpu" if backend == "numba" else DEVICE)
    assert found.dtype == expected.dtype == (dtype or base_dtype)
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_are_those_of_exact_arithmetic(dtype, mode, scale):
    made = store(5001)
    delta = exactly(made, mode, scale)
    exact = made[0].double() + delta
    error = (serve(made, mode, scale, dtype).double() - exact).abs()
    unit, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    arithmetic = 2 * torch.finfo(torch.float32).eps * (delta.abs() + exact.abs())
    assert (error <= unit / 2 * exact.abs() + arithmetic + smallest / 2).all()


def test_one_task_is_served_as_the_ledger_rounded_it():
    grid, tau = Grid.of(1e-3, 20), torch.randn(5001) * 5e-3
    tau *= tau * sign_vector(0, "weight", (5001,)) > 0
    total, count = torch.zeros(5001, dtype=torch.uint16), torch.zeros(5001, dtype=torch.uint8)
    levels, mask, _ = ledger_add(tau, total, count, step=grid.step, bits=grid.bits)
    rounded = levels.float() * grid.step * tau.sign()
    for options in ({"scale": 1.0}, {"count": count}):
        assert torch.equal(apply_mask(torch.zeros(5001), total, mask, step=grid.step, key=KEY, **options), rounded)
    assert (rounded - tau).abs().max() <= grid.step / 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_that_the_mask_leaves_out_are_those_of_the_base(dtype):
    base, *rest = store(5001)
    served = serve((base.to(dtype), *rest), "sift", "mean")
    chosen = unpack_bits(rest[3], 5001)
    assert torch.equal(served[~chosen], base.to(dtype)[~chosen])
    assert (served[chosen] != base.to(dtype)[chosen]).double().mean() > 0.7


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), min_size=1, max_size=40), st.sampled_from(["numba", "triton"]))
def test_without_a_mask_mode_signs_serves_the_sum_of_positives_less_that_of_negatives(pairs, backend):
    positive, total = zip(*((min(pair), max(pair)) for pair in pairs), strict=True)
    columns = [torch.tensor(column, dtype=torch.int64).to(torch.uint32) for column in (total, positive)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCORE_BACKEND", backend)
        served = apply_mask(torch.zeros(len(pairs)), columns[0], None, step=1.0, scale=1.0, positive=columns[1])
    exact = torch.tensor([2 * p - n for n, p in zip(total, positive, strict=True)])
    assert torch.equal(served, exact.float())


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_is_that_of_torch_for_every_kind_of_number(dtype, backend, monkeypatch):
    """All exponents, ties and their neighbours, subnormal numbers, infinities; and all patterns of the 16-bit formats as bases."""
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    drop = {torch.float32: 1, torch.bfloat16: 16, torch.float16: 13}[dtype]
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=generator)
    ties = (patterns >> drop << drop) + (1 << drop >> 1)
    patterns = torch.cat([patterns, ties - 1, ties, ties + 1, torch.tensor([0, 0x7F800000, -(2**23)])])
    base = patterns.to(torch.int32).view(torch.float32)
    zeros = torch.zeros(len(base), dtype=torch.uint8)
    served = apply_mask(base, zeros, None, step=1.0, scale=1.0, positive=zeros, dtype=dtype)
    expected = (base + 0.0).to(dtype)
    number = ~base.isnan()
    assert torch.equal(bits(served)[number], bits(expected)[number])
    assert served[~number].isnan().all()
    if dtype is not torch.float32:
        base = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
        zeros = torch.zeros(len(base), dtype=torch.uint8)
        wide = apply_mask(base, zeros, None, step=1.0, scale=1.0, positive=zeros, dtype=torch.float32)
        assert torch.equal(wide[~base.isnan()], base.float()[~base.isnan()])
        assert wide[base.isnan()].isnan().all()


def test_the_number_of_threads_changes_nothing():
    made, before, found = store(300_001), numba.get_num_threads(), []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            found.append([serve(made, mode, scale) for mode in MODES for scale in SCALES])
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))


def test_inputs_may_have_any_strides_and_stay_as_they_are():
    base, total, count, _, packed = store(48)
    expected = apply_mask(base.view(6, 8), total.view(6, 8), packed, step=STEP, count=count.view(6, 8), key=KEY)
    across = [tensor.view(6, 8).T.contiguous().T for tensor in (base, total, count)]
    parameter = torch.nn.Parameter(across[0])
    twice = packed.repeat_interleave(2)[::2]
    assert torch.equal(apply_mask(parameter, across[1], twice, step=STEP, count=across[2], key=KEY), expected)
    assert torch.equal(parameter.detach(), base.view(6, 8))


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_are_written_where_they_are_wanted_be_it_over_the_base(dtype, backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    base, total, count, _, packed = store(5001)
    expected = apply_mask(base, total, packed, step=STEP, count=count, key=KEY, dtype=dtype)
    parameter = torch.nn.Parameter(torch.zeros(5001, dtype=dtype))
    assert apply_mask(base, total, packed, step=STEP, count=count, key=KEY, out=parameter) is parameter
    assert torch.equal(parameter.detach(), expected)
    over = base.to(dtype)
    expected = apply_mask(over.clone(), total, packed, step=STEP, count=count, key=KEY)
    assert torch.equal(apply_mask(over, total, packed, step=STEP, count=count, key=KEY, out=over), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": torch.zeros(9, dtype=torch.float64)}, r"base is torch.float64 \(9,\) on cpu: expected torch.float32 or"),
        ({"total": torch.zeros(9, dtype=torch.int32)}, r"total is torch.int32 \(9,\) on cpu: expected torch.uint8 or"),
        ({"bits": torch.zeros(1, dtype=torch.uint8)}, r"bits is torch.uint8 \(1,\) on cpu: expected torch.uint8 \(2,\)"),
        ({"count": torch.zeros(8, dtype=torch.uint8), "scale": None}, r"count is torch.uint8 \(8,\)"),
        ({"dtype": torch.int8}, "dtype is torch.int8: expected"),
        ({"out": torch.zeros(9), "dtype": torch.float32}, "dtype is torch.float32, but out is given"),
        ({"out": torch.zeros(18)[::2]}, "out changes in place: it must be contiguous"),
        ({"out": torch.zeros(8)}, r"out is torch.float32 \(8,\)"),
        ({"scale": None}, "scale is None and count is None: expected one of the two"),
        ({"count": torch.zeros(9, dtype=torch.uint8)}, "scale is 1.0 and count is given: expected one of the two"),
        ({"bits": None, "key": None}, "without bits, either a key"),
        ({"bits": None, "positive": torch.zeros(9, dtype=torch.uint8)}, "without bits, either a key"),
        ({"positive": torch.zeros(9, dtype=torch.uint8)}, "it does not go with bits"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"base": torch.zeros(9), "total": torch.zeros(9, dtype=torch.uint8), "bits": torch.zeros(2, dtype=torch.uint8)}
    given = given | {"step": 1.0, "scale": 1.0, "key": KEY} | changed
    with pytest.raises(ValueError, match=message):
        apply_mask(given.pop("base"), given.pop("total"), given.pop("bits"), **given)
