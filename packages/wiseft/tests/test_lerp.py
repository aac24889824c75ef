"""Interpolated weights are correctly rounded on a CPU, and the Triton kernel equals the reference bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from wiseft.ops.lerp import lerp, numba, numpy, reference

triton_lerp = pytest.importorskip("wiseft.ops.lerp.triton").lerp
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DELTAS = [0.1, 0.3, 0.5, 0.7]
FORMATS = {torch.bfloat16: (7, 127), torch.float16: (10, 15), torch.float32: (23, 127)}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def random_pair(size, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(size)
    early = torch.randn(size, generator=generator)
    late = early + torch.randn(size, generator=generator) * 0.1
    return early.to(device, dtype), late.to(device, dtype)


def nearest_even(value: float, mantissa: int, bias: int) -> float:
    """Round a double to a smaller format in exact rational arithmetic: an oracle that shares nothing with the kernel."""
    if value == 0 or not np.isfinite(value):
        return value
    exponent = max(np.frexp(abs(value))[1] - 1, 1 - bias)
    unit = Fraction(2) ** int(exponent - mantissa)
    rounded = round(Fraction(abs(value)) / unit) * unit  # round() of a Fraction is to nearest even
    largest = (2 - Fraction(1, 2**mantissa)) * Fraction(2) ** bias
    return float(np.copysign(float(rounded) if rounded <= largest else np.inf, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", DELTAS)
def test_every_weight_is_correctly_rounded(dtype, delta):
    early, late = random_pair(5001, dtype)
    exact = late.double().numpy() + delta * (early.double().numpy() - late.double().numpy())
    expected = [nearest_even(value, *FORMATS[dtype]) for value in exact]
    assert lerp(early, late, delta).double().tolist() == expected


@pytest.mark.parametrize("arithmetic", [numba, numpy], ids=["numba", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_at_the_edges_of_the_format(dtype, arithmetic):
    mantissa, bias = FORMATS[dtype]
    smallest, normal, largest = 2.0 ** (1 - bias - mantissa), 2.0 ** (1 - bias), (2 - 2.0**-mantissa) * 2.0**bias
    edges = [0.0, smallest, normal, normal - smallest, 1.0, 1 + 2.0**-mantissa, 3.0, largest]
    ties = [
        low + fraction * 2.0**-mantissa * scale
        for low, scale in [(1.0, 1), (2.0, 2), (normal, normal)]
        for fraction in (0.5, 1.5)
    ]
    tiny = [smallest * fraction for fraction in (0.25, 0.5, 0.75, 1.5, 2.5, 100.5)]
    huge = [largest * (1 + 2.0 ** -(mantissa + 2)), largest + 2.0 ** (bias - mantissa - 1), largest * 2, np.inf]
    values = np.array([*edges, *ties, *tiny, *huge])
    values = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, np.inf), -values])
    out = np.empty(len(values), numpy.BITS[NAMES[dtype]])
    assert arithmetic.encode(values, NAMES[dtype], out), "some are infinite, or become so: that is reported"
    kept = np.array([value for value in values if abs(nearest_even(value, mantissa, bias)) < np.inf])
    assert not arithmetic.encode(kept, NAMES[dtype], np.empty(len(kept), out.dtype))
    for value in huge:
        assert arithmetic.encode(np.array([value]), NAMES[dtype], out[:1].copy()) == (
            nearest_even(value, mantissa, bias) == np.inf
        )
    found = torch.from_numpy(out.copy()).view(dtype).double().tolist()
    assert found == [nearest_even(value, mantissa, bias) for value in values]


@pytest.mark.parametrize("arithmetic", [numba, numpy], ids=["numba", "numpy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_16_bit_patterns_survive_decoding_and_encoding(dtype, arithmetic):
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits).view(dtype).double().numpy()
    decoded = np.empty(len(bits))
    arithmetic.decode(bits, NAMES[dtype], decoded)
    assert np.array_equal(decoded, expected, equal_nan=True)
    assert np.array_equal(np.signbit(decoded), np.signbit(expected))
    out = np.empty_like(bits)
    assert arithmetic.encode(decoded, NAMES[dtype], out), "the patterns hold NaN, which is reported"
    number = expected == expected
    assert np.array_equal(out[number], bits[number])
    assert torch.from_numpy(out[~number]).view(dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 63, 4096, 5001])
def test_kernel_is_bit_equal_to_reference(size, dtype):
    early, late = random_pair(size, dtype, DEVICE)
    assert torch.equal(triton_lerp(early, late, 0.3), reference.lerp(early, late, 0.3))


@pytest.mark.parametrize("early_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("late_dtype", DTYPES, ids=str)
def test_kernel_and_cpu_agree_within_one_unit_for_mixed_dtypes(early_dtype, late_dtype):
    early, late = random_pair(1000, early_dtype, DEVICE)[0], random_pair(1000, late_dtype, DEVICE)[1]
    kernel, exact = triton_lerp(early, late, 0.3), lerp(early.cpu(), late.cpu(), 0.3)
    assert kernel.dtype == exact.dtype == late_dtype
    larger = torch.maximum(early.cpu().double().abs(), late.cpu().double().abs())
    unit = torch.finfo(late_dtype).eps * larger  # where the two nearly cancel, the result's own unit is smaller still
    assert ((kernel.cpu().double() - exact.double()).abs() <= unit).all()


@pytest.mark.parametrize("implementation", [lerp, triton_lerp, reference.lerp])
def test_empty_tensor(implementation):
    assert implementation(torch.zeros(0, 3, device=DEVICE), torch.zeros(0, 3, device=DEVICE), 0.5).shape == (0, 3)


def test_non_contiguous_input():
    early, late = torch.randn(6, 8).T, torch.randn(8, 6)
    assert torch.allclose(lerp(early, late, 0.3), 0.3 * early + 0.7 * late, atol=1e-6)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"early has shape \(2,\), late has \(3,\)"):
        lerp(torch.zeros(2), torch.zeros(3), 0.5)


@pytest.mark.parametrize("dtype", [*NAMES.values(), "F64"])
def test_numpy_gives_the_bits_of_numba(dtype):
    generator = np.random.default_rng(0)
    values = generator.standard_normal(100_000) * 10.0 ** generator.integers(-9, 5, 100_000)
    halfway = (generator.integers(0x3F80, 0x4000, 1000).astype(np.uint32) << 16 | 0x8000).view(np.float32).astype(np.float64)
    values = np.concatenate([values, halfway, np.nextafter(halfway, 0), np.nextafter(halfway, 9), -np.nextafter(halfway, 9)])
    kind = numpy.BITS[dtype]
    encoded = [np.empty(len(values), kind) for _ in range(2)]
    reported = [arithmetic.encode(values, dtype, out) for arithmetic, out in zip((numba, numpy), encoded, strict=True)]
    assert reported[0] == reported[1]
    assert encoded[0].tobytes() == encoded[1].tobytes()
    decoded = [np.empty(len(values)) for _ in range(2)]
    for arithmetic, out in zip((numba, numpy), decoded, strict=True):
        arithmetic.decode(encoded[0], dtype, out)
    assert decoded[0].tobytes() == decoded[1].tobytes()
    finite = np.nan_to_num(decoded[0], posinf=1.0, neginf=1.0)
    mixed = [np.empty(len(values)) for _ in range(2)]
    for arithmetic, out in zip((numba, numpy), mixed, strict=True):
        arithmetic.mix(finite, values, 0.3, out)
        arithmetic.add_scaled(out, values, 0.7)
    assert mixed[0].tobytes() == mixed[1].tobytes()
