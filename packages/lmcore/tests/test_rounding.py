"""Rounding in a kernel gives torch's bfloat16, bit for bit."""

import torch
import triton
import triton.language as tl

from lmcore.rounding import round_to_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _round_all(x, out, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offset, round_to_bf16(tl.load(x + offset, offset < size)), offset < size)


def rounded(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 with these bits, and what the kernel rounds them to."""
    x = bits.to(torch.int32).view(torch.float32).to(DEVICE)
    out = torch.empty(len(x), dtype=torch.bfloat16, device=DEVICE)
    _round_all[(triton.cdiv(len(x), 65536),)](x, out, len(x), 65536)
    return x, out


def test_every_upper_half_rounds_as_torch_does():
    """All signs, exponents and kept digits, with cut digits at, beside and far from a tie: also ±inf, overflow and subnormals."""
    cut = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x, out = rounded((torch.arange(65536)[:, None] * 65536 + cut).flatten())
    number = ~x.isnan()
    assert torch.equal(out[number].view(torch.int16), x[number].bfloat16().view(torch.int16))
    assert out[~number].isnan().all()


def test_a_tie_goes_to_the_even_neighbour():
    _, out = rounded(torch.tensor([0x3F808000, 0x3F818000, 0x3F808001]))
    assert out.tolist() == [1.0, 1.015625, 1.0078125]


def test_a_signalling_nan_becomes_quiet_and_keeps_its_sign_and_payload():
    _, out = rounded(torch.tensor([0x7F800001, 0xFF800001, 0x7FA50000]))
    assert [bits & 0xFFFF for bits in out.view(torch.int16).tolist()] == [0x7FC0, 0xFFC0, 0x7FE5]
