"""The same numbers from every back end and for any range, pinned by vectors, distributed as they say."""

import hashlib
import math
import os
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lmcore import random
from lmcore.random import numba, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = {"random_bits": random.random_bits, "signs": random.signs, "uniform": random.uniform, "normal": random.normal}


@pytest.fixture(params=["reference", "numba", "triton"])
def backend(request, monkeypatch):
    """Runs a test once on each back end; returns the device that it fills."""
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    return "cpu" if request.param == "numba" else DEVICE


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_reference_gives_the_published_vectors(counter, key, words):
    """The known answers that come with Random123, the code of the paper."""
    k0, k1 = (int(word, 16) for word in key.split())
    lanes = reference.philox(k0, k1, *(torch.tensor([int(word, 16)]) for word in counter.split()))
    assert [lane.item() for lane in lanes] == [int(word, 16) for word in words.split()]


def test_the_numba_function_gives_the_published_vector():
    assert numba.philox(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize(
    ("seed", "name", "words"),
    [
        (0, "", (0x5BEA08CA, 0x18CC49CA)),
        (0, "model.embed_tokens.weight", (0x1DF2782E, 0xBEEC4321)),
        (2**64 - 1, "Gewichte für ℝ", (0x32EBC4EC, 0x6B2083A4)),
    ],
)
def test_keys_are_pinned(seed, name, words):
    assert random.key(seed, name) == words


@pytest.mark.parametrize(
    ("seed", "name", "start", "words", "normals"),
    [
        (
            0,
            "model.embed_tokens.weight",
            0,
            [0xC95AA2C1, 0xF51992D0, 0x95C5ED2C, 0xFC580770, 0x362573EA, 0xB7B9C8C9],
            ["0x1.96c4dap-1", "0x1.b8b556p+0", "0x1.b7fa8ap-3", "0x1.184028p+1", "-0x1.9a366ap-1", "0x1.26e41ep-1"],
        ),
        (
            1,
            "model.embed_tokens.weight",
            0,
            [0xA568A040, 0x76A7AF9E, 0x04954D70, 0xAA6328F6, 0x87233E96, 0x38C1870A],
            ["0x1.7fe25cp-2", "-0x1.77508ep-4", "-0x1.0caff4p+1", "0x1.b5fe6ep-2", "0x1.1e7f52p-4", "-0x1.886cb6p-1"],
        ),
        (
            0,
            "lm_head.weight",
            2**34 - 3,  # lane 1, three words before the counter outgrows 32 bits
            [0x0CDB9E24, 0xB73D1630, 0xB47110D6, 0x2A96B2C4, 0x949758F7, 0x9EF0FB70],
            ["-0x1.a485b6p+0", "0x1.24036p-1", "0x1.13a97p-1", "-0x1.eff1d2p-1", "0x1.9fc102p-3", "0x1.3b236cp-2"],
        ),
    ],
)
def test_numbers_are_pinned_on_every_back_end(seed, name, start, words, normals, backend):
    """What a stored mask or a published noise depends on: these may never change."""
    drawn = {kind: draw(seed, name, 6, start=start, device=backend).tolist() for kind, draw in DRAWS.items() if kind != "signs"}
    assert drawn == {
        "random_bits": words,
        "uniform": [(word >> 8) / 2**24 for word in words],
        "normal": [float.fromhex(number) for number in normals],
    }


@pytest.mark.parametrize(
    ("seed", "name", "start", "signs"),
    [
        (0, "model.embed_tokens.weight", 0, "+-----++-+---+-+-+-++-+-+--+--++----+-++-+--+--++--++---+-+-++++--++-+"),
        (0, "lm_head.weight", 2**39 - 3, "+-+--+---++-+--++-+-++-+--+-+-+-+--+++-++++---++-+-+++-+--+--+-+--+---"),
    ],
)
def test_signs_are_pinned_on_every_back_end(seed, name, start, signs, backend):
    assert random.signs(seed, name, 70, start=start, device=backend).tolist() == [1 if sign == "+" else -1 for sign in signs]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("start", [0, 1, 4094, 2**32 - 2501, 2**34 - 2499, 2**40 + 3])
@pytest.mark.parametrize("size", [0, 1, 63, 5001])
def test_back_ends_are_bit_equal(kind, size, start, monkeypatch):
    drawn = []
    for name in ["reference", "numba", "triton"]:
        monkeypatch.setenv("LMCORE_BACKEND", name)
        drawn.append(DRAWS[kind](7, "weight", size, start=start, device="cpu" if name == "numba" else DEVICE).cpu())
    assert len(drawn[0]) == size
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", DRAWS)
def test_a_slice_is_the_same_as_in_the_whole(kind, backend):
    start = 2**34 - 2500
    whole = DRAWS[kind](0, "weight", 5001, start=start, device=backend)
    for first, size in [(0, 1), (1, 1), (2, 5), (2499, 3), (3, 4998), (4998, 3)]:
        assert torch.equal(DRAWS[kind](0, "weight", size, start=start + first, device=backend), whole[first : first + size])


def test_a_counter_beyond_32_bits_fills_the_second_counter_word(backend):
    counter = [torch.tensor([word]) for word in (5, 3, 0, 0)]
    expected = [lane.item() for lane in reference.philox(*random.key(0, "weight"), *counter)]
    assert random.random_bits(0, "weight", 4, start=4 * (3 * 2**32 + 5), device=backend).tolist() == expected


def test_every_second_element_can_be_filled(backend):
    out = torch.zeros(201, device=backend)
    random.fill(out[::2], "normal", 0, "weight", 3)
    assert torch.equal(out[::2], random.normal(0, "weight", 101, start=3, device=backend))
    assert not out[1::2].any()


def test_arrays_are_filled_without_importing_torch():
    program = """
import sys
import numpy as np
from lmcore import random
for kind, dtype in random.DTYPES.items():
    out = np.empty(5, dtype)
    random.fill(out, kind, 0, "weight", 2**34 - 2)
    print(*out.tolist())
sys.exit("torch" in sys.modules)
"""
    plain = {name: value for name, value in os.environ.items() if name != "LMCORE_BACKEND"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=plain)
    assert run.returncode == 0, run.stderr
    drawn = [[float(number) for number in line.split()] for line in run.stdout.splitlines()]
    assert drawn == [DRAWS[kind](0, "weight", 5, start=2**34 - 2).tolist() for kind in random.DTYPES]


@pytest.mark.parametrize(
    ("out", "start"),
    [
        (torch.zeros(4, dtype=torch.float64), 0),
        (np.zeros(4), 0),
        (torch.zeros(2, 2), 0),
        (np.zeros((2, 2), np.float32), 0),
        (torch.zeros(4), -1),
    ],
    ids=["tensor dtype", "array dtype", "tensor rank", "array rank", "start"],
)
def test_what_cannot_be_filled_is_refused(out, start):
    with pytest.raises(ValueError, match=r"normal needs start >= 0, not .*, and out float32 \[size\]"):
        random.fill(out, "normal", 0, "weight", start)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(OverflowError):
        random.signs(seed, "weight", 1)


def test_the_normal_table_is_pinned_and_antisymmetric():
    table = random.normal_table()
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == "ffb734fc1fbac07335f642226a35e0fd14572eab3821873015374a1482d734e4"
    assert np.array_equal(table, -table[::-1])
    assert not table.flags.writeable, "all callers share it"
    assert (np.diff(table) > 0).all()


def test_normal_moments_over_all_words_are_as_documented():
    """Sums over the 2^32 words in closed form: in each bin x = a + d f, with f = 0/65536 ... 65535/65536."""
    table = random.normal_table().astype(float)
    a, d = table[:-1], np.diff(table)
    f = np.arange(65536) / 65536
    mean, variance, fourth = (
        sum(math.comb(n, k) * (a ** (n - k) * d**k).mean() * (f**k).mean() for k in range(n + 1)) for n in (1, 2, 4)
    )
    assert abs(mean) < 2e-9
    assert abs(variance - 1) < 1e-9
    assert round(fourth, 4) == 2.9999


def test_the_normal_distribution_function_is_within_its_documented_error():
    """Every one of the 64 outermost bins, where the error is largest, and a sample of the others."""
    exact = NormalDist()
    table = random.normal_table().astype(float)
    errors = [
        abs(exact.cdf(table[i] + (table[i + 1] - table[i]) * f) - (i + f) / 65536)
        for i in [*range(64), *range(64, 32768, 97)]
        for f in np.linspace(0, 1, 41)
    ]
    assert max(errors) < 2.4e-6


def test_the_outermost_words_give_the_documented_tails():
    table = random.normal_table()
    low, below_zero, zero, high = (float(numba.as_normal(np.uint32(word), table)) for word in (0, 2**31 - 1, 2**31, 2**32 - 1))
    assert round(low, 4) == -4.5793
    assert f"{2 * NormalDist().cdf(low):.1e}" == "4.7e-06"
    assert below_zero < zero == 0
    assert 4.5792 < high <= -low


def test_a_million_draws_have_the_distribution_they_claim():
    """Kolmogorov-Smirnov: sqrt(n) times the largest gap exceeds 1.63 with probability 0.01 (the seed is fixed)."""
    n = 2**20
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    for drawn in (random.uniform(0, "a", n).double(), torch.special.ndtr(random.normal(0, "b", n).double())):
        ordered = drawn.sort().values
        gap = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max().item()
        assert math.sqrt(n) * gap < 1.63
    bits = random.random_bits(0, "c", n).long()
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(32)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_uniforms_and_normals_of_one_name_agree():
    uniform, normal = (DRAWS[kind](0, "weight", 5001) for kind in ("uniform", "normal"))
    assert torch.equal(uniform >= 0.5, normal >= 0)


@pytest.mark.parametrize("start", [0, 1, 31, 32, 2**39 - 17])
def test_a_sign_is_one_bit_of_a_word_the_lowest_first(start):
    words = random.random_bits(0, "weight", 4, start=start // 32).tolist()
    places = range(start % 32, start % 32 + 90)
    expected = [1 if words[place // 32] >> (place % 32) & 1 else -1 for place in places]
    assert random.signs(0, "weight", 90, start=start).tolist() == expected


def test_other_names_seeds_and_places_are_independent():
    """Correlations of 2^18 pairs have a standard deviation of 2^-9."""
    n = 2**18
    drawn = torch.stack(
        [
            random.normal(0, "layers.0.weight", n),
            random.normal(0, "layers.1.weight", n),
            random.normal(1, "layers.0.weight", n),
            *(random.normal(0, "layers.0.weight", n, start=lag) for lag in (1, 2, 4, n, 2**34)),
        ]
    )
    correlation = torch.corrcoef(drawn.double())
    assert (correlation - torch.eye(len(drawn))).abs().max() < 4.5 * 2**-9
