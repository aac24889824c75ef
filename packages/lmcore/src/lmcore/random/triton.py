"""Philox4x32-10 in Triton. Normals need `enable_fp_fusion=False` to get the same bits."""

import torch
import triton
import triton.language as tl

from lmcore.random.reference import table


def fill(out, kind, key, start):
    """Overwrite `out` with the numbers from flat index `start` on."""
    grid = (triton.cdiv(start % 4 + len(out), 2048),)  # the words of 512 counters
    with torch.cuda.device_of(out):
        _fill[grid](out, out.stride(0), table(out.device), key[0] | key[1] << 32, start, len(out), kind, enable_fp_fusion=False)


@triton.jit
def words(key, counter):
    """Return the words [4 n] of 64-bit counters [n], by flat index; the second key word is the upper half of `key`."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    lane0, lane1, lane2, lane3 = tl.philox(key, low, high, low * 0, low * 0)
    return tl.interleave(tl.interleave(lane0, lane2), tl.interleave(lane1, lane3))


@triton.jit(do_not_specialize=["key", "start"])
def _fill(out, stride, table, key: tl.uint64, start: tl.int64, size, KIND: tl.constexpr, COUNTERS: tl.constexpr = 512):
    first = start // 4 + tl.program_id(0).to(tl.int64) * COUNTERS
    word = words(key, first + tl.arange(0, COUNTERS))
    offset = 4 * first - start + tl.arange(0, 4 * COUNTERS)
    number = word
    if KIND == "uniform":
        number = (word >> 8).to(tl.float32) * 2.0**-24
    elif KIND == "normal":
        low, high = tl.load(table + (word >> 16)), tl.load(table + (word >> 16) + 1)
        number = low + (high - low) * ((word & 0xFFFF).to(tl.float32) * 2.0**-16)
    tl.store(out + offset * stride, number.to(out.dtype.element_ty), (offset >= 0) & (offset < size))
