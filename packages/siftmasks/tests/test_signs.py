"""The sign vector is a function of the seed, the name and the flat index, and favours neither sign."""

import pytest
import torch

from lmcore.random import key, random_bits
from siftmasks.bits import pack_bits, unpack_bits
from siftmasks.ops.reference import signs as signs_of_key
from siftmasks.signs import sign_vector


def test_signs_are_pinned():
    """What every stored mask depends on: these may never change."""
    drawn = sign_vector(0, "model.layers.0.mlp.up_proj.weight", (4, 10))
    assert "".join("-+"[sign > 0] for sign in drawn.flatten().tolist()) == "-++--+++-+----++---++++----++---++--+-+-"


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (31,), (63,), (64, 64), (3, 1667)])
def test_a_sign_is_one_bit_of_a_word_along_the_flat_index(shape):
    drawn = sign_vector(3, "weight", shape)
    assert (drawn.shape, drawn.dtype) == (torch.Size(shape), torch.int8)
    words = random_bits(3, "weight", (drawn.numel() + 31) // 32).tolist()
    assert drawn.flatten().tolist() == [1 if words[i // 32] >> (i % 32) & 1 else -1 for i in range(drawn.numel())]


def test_the_kernels_key_gives_the_same_signs():
    shape = torch.Size([3, 1667])
    assert torch.equal(signs_of_key(key(3, "weight"), shape, torch.device("cpu")), sign_vector(3, "weight", shape))


def test_names_and_seeds_draw_independent_signs_of_mean_zero():
    """Sums over 2^18 signs have a standard deviation of 2^9."""
    drawn = torch.stack([sign_vector(seed, name, (2**18,)) for seed in (0, 1) for name in ("a", "b")]).double()
    assert drawn.sum(1).abs().max() < 4 * 2**9
    assert (drawn @ drawn.T - 2**18 * torch.eye(4)).abs().max() < 4 * 2**9


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 5001])
def test_packed_bits_unpack_to_what_they_were(size):
    flags = torch.rand(size) < 0.5
    packed = pack_bits(flags)
    assert packed.tolist() == [sum(int(bit) << j for j, bit in enumerate(flags[i : i + 8])) for i in range(0, size, 8)]
    assert torch.equal(unpack_bits(packed, size), flags)
