"""The kernels of `linear_logprob`: logits live in registers forward, and their gradients in one slab of bounded size backward."""

import torch
import triton
import triton.language as tl

from lmcore.rounding import round_to_bf16

TILE = 2**26  # elements of the slab of logit gradients: 128 MiB for half dtypes, 256 MiB for float32
TILE_TOKENS = 2**13  # tokens in a slab at most, so that it stays wide: each slab costs a pass over the float32 sums
PROGRAMS = 2**12  # forward splits the vocabulary until about so many run: 30 for each multiprocessor of a large GPU
LOWEST = tl.constexpr(-1e30)  # stands for -inf, since 0 * it is 0


def forward(hidden, weight, target, bias, softcap, with_entropy):
    """Return log-probability, logsumexp and entropy (zeros if not asked for), each [n]."""
    # A target outside the vocabulary is found by no program: its log-probability stays NaN.
    target_logit = hidden.new_full(target.shape, torch.nan, dtype=torch.float32)
    logsumexp, entropy = torch.zeros_like(target_logit), torch.zeros_like(target_logit)
    if len(hidden):
        inputs, (blocks, tiles), options = _launch(hidden, weight, bias, target, softcap)
        tiles_each = triton.cdiv(tiles * blocks, PROGRAMS)
        part_logsumexp = logsumexp.new_empty((triton.cdiv(tiles, tiles_each), len(hidden)))
        part_entropy = torch.empty_like(part_logsumexp) if with_entropy else None
        with torch.cuda.device_of(hidden):
            _forward[blocks, len(part_logsumexp)](*inputs, target_logit, part_logsumexp, part_entropy, tiles_each, **options)
        logsumexp = part_logsumexp.logsumexp(0)
        if with_entropy:  # that of a mixture of distributions on disjoint parts of the vocabulary
            log_share = part_logsumexp - logsumexp
            entropy = (log_share.exp() * (part_entropy - log_share)).sum(0)
    return target_logit - logsumexp, logsumexp, entropy


def backward(grad_logprob, grad_entropy, saved, softcap, needs):
    """Return the gradients of those of hidden, weight and bias that `needs` marks."""
    hidden, weight, target, bias, logsumexp, entropy = saved
    grad_entropy = torch.zeros_like(grad_logprob) if grad_entropy is None else grad_entropy
    hidden_sum = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs[0] else None
    grad_weight = weight.new_empty(weight.shape) if needs[1] else None
    bias_sum = bias.new_zeros(bias.shape, dtype=torch.float32) if needs[2] else None
    step_n = max(1, min(len(hidden), TILE_TOKENS))
    step_v = 128 * max(1, min(TILE // step_n, len(weight) + 127) // 128)  # a multiple of 128 keeps the rows of the slab aligned
    slab = hidden.new_empty((step_n, step_v))
    for first in range(0, len(weight), step_v):
        part = slice(first, first + step_v)
        w, b = weight[part], None if bias is None else bias[part]
        weight_sum = w.new_zeros(w.shape, dtype=torch.float32) if needs[1] else None
        for rows in (slice(start, start + step_n) for start in range(0, len(hidden), step_n)):
            h, *per_token = (x[rows] for x in (hidden, logsumexp, entropy, grad_logprob, grad_entropy))
            inputs, grid, options = _launch(h, w, b, target[rows] - first, softcap)
            dz = slab[: len(h), : len(w)]
            with torch.cuda.device_of(h):
                _logit_gradient[grid](*inputs, *(x.contiguous() for x in per_token), dz, step_v, **options)
            if needs[0]:
                _add_product(hidden_sum[rows], dz, w)
            if needs[1]:
                _add_product(weight_sum, dz.T, h)
            if needs[2]:
                bias_sum[part] += dz.sum(0, dtype=torch.float32)
        if needs[1]:
            grad_weight[part] = weight_sum
    return [grad.to(hidden.dtype) for grad in (hidden_sum, grad_weight, bias_sum) if grad is not None]


def _add_product(total, left, right):
    """Add `left @ right` to `total` in float32. A GPU multiplies half operands as they are, a CPU only after widening."""
    half_on_gpu = left.is_cuda and left.dtype != torch.float32
    total += torch.mm(left, right, out_dtype=torch.float32) if half_on_gpu else left.float() @ right.float()


def _launch(hidden, weight, bias, target, softcap):
    """Return the arguments that both kernels start with, the grid (blocks of tokens, tiles of the vocabulary) and the options."""
    sizes = (len(hidden), *weight.shape, *hidden.stride(), *weight.stride())
    inputs = (hidden, weight, None if bias is None else bias.contiguous(), target.contiguous(), *sizes)
    # Half operands go to tensor cores through three stages of 32 KiB; float32 has no tensor cores and needs registers for its sums.
    block, depth, warps = (64, 32, 4) if hidden.dtype == torch.float32 else (128, 64, 8)
    block_n = min(block, max(16, triton.next_power_of_2(len(hidden))))
    options = {"BLOCK_N": block_n, "BLOCK_V": block, "BLOCK_D": depth, "num_warps": warps, "num_stages": 3, "SOFTCAP": softcap,
               "WIDEN": triton.knobs.runtime.interpret, "enable_fp_fusion": True}  # fmt: skip
    return inputs, (triton.cdiv(len(hidden), block_n), triton.cdiv(len(weight), block)), options


@triton.jit
def _forward(hidden, weight, bias, target, n, v, d, hidden_n, hidden_d, weight_v, weight_d, target_logit, part_logsumexp, part_entropy,
             tiles_each, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Write logsumexp and entropy of softmax(z) over one part of the vocabulary, and the logits of the targets in it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = tl.load(target + row, row < n, other=-1)
    highest = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # Σ exp(z - highest)
    moment, found = total, total  # Σ exp(z - highest) (z - highest): entropy = log total - moment / total
    first = tl.program_id(1) * tiles_each * BLOCK_V
    last = min(first + tiles_each * BLOCK_V, v)
    for start in range(first, last, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _logits(hidden, weight, bias, row, column, n, v, d, hidden_n, hidden_d, weight_v, weight_d, SOFTCAP, WIDEN, BLOCK_D)
        z = tl.where(column[None, :] < v, z, LOWEST)
        found += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        risen = tl.maximum(highest, tl.max(z, 1))
        fall = highest - risen
        z -= risen[:, None]
        e = tl.exp(z)
        if part_entropy is not None:
            moment = tl.exp(fall) * (moment + total * fall) + tl.sum(e * z, 1)
        total = tl.exp(fall) * total + tl.sum(e, 1)
        highest = risen
    out = tl.program_id(1).to(tl.int64) * n + row
    tl.store(part_logsumexp + out, highest + tl.log(total), row < n)
    if part_entropy is not None:
        tl.store(part_entropy + out, tl.log(total) - moment / total, row < n)
    tl.store(target_logit + row, found, (row < n) & (first <= wanted) & (wanted < last))


@triton.jit
def _logit_gradient(hidden, weight, bias, target, n, v, d, hidden_n, hidden_d, weight_v, weight_d, logsumexp, entropy, grad_logprob,
                    grad_entropy, out, out_n, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write a tile of dz = grad_logprob (onehot(target) - p) - grad_entropy p (log p + entropy), before the softcap."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits(hidden, weight, bias, row, column, n, v, d, hidden_n, hidden_d, weight_v, weight_d, SOFTCAP, WIDEN, BLOCK_D)
    wanted = tl.load(target + row, row < n, other=-1)[:, None]
    g = tl.load(grad_logprob + row, row < n, other=0.0)[:, None]
    g_entropy = tl.load(grad_entropy + row, row < n, other=0.0)[:, None]
    log_p = z - tl.load(logsumexp + row, row < n, other=0.0)[:, None]
    log_p_plus_entropy = log_p + tl.load(entropy + row, row < n, other=0.0)[:, None]
    dz = tl.where(column[None, :] == wanted, g, 0.0) - tl.exp(log_p) * (g + g_entropy * log_p_plus_entropy)
    if SOFTCAP is not None:
        dz *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    dz = round_to_bf16(dz) if out.dtype.element_ty == tl.bfloat16 else dz.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_n + column[None, :], dz, (row[:, None] < n) & (column[None, :] < v))


@triton.jit
def _logits(hidden, weight, bias, row, column, n, v, d, hidden_n, hidden_d, weight_v, weight_d,
            SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Compute one tile of z. The interpreter multiplies bfloat16 as bit patterns: there, and only there, operands are WIDENed."""
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    hidden += row.to(tl.int64)[:, None] * hidden_n
    weight += column.to(tl.int64)[None, :] * weight_v
    for start in range(0, d, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D).to(tl.int64)
        h = tl.load(hidden + inner[None, :] * hidden_d, (row[:, None] < n) & (inner[None, :] < d), other=0.0)
        w = tl.load(weight + inner[:, None] * weight_d, (column[None, :] < v) & (inner[:, None] < d), other=0.0)
        # float32 operands keep all their bits: tf32, the default, would be wrong in the third digit of a log-probability.
        z = tl.dot(h.to(tl.float32) if WIDEN else h, w.to(tl.float32) if WIDEN else w, z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + column, column < v, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP is not None:
        shrunk = tl.exp(-2 * tl.abs(z / SOFTCAP))  # tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|) cannot overflow
        size = SOFTCAP * (1 - shrunk) / (1 + shrunk)
        z = tl.where(z < 0, -size, size)
    return z
