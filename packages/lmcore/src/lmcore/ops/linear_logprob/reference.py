"""The reference of `linear_logprob`: plain torch, a chunk of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 2**22  # elements of a chunk's logits: 16 MiB of float32, of which a few live at a time


def forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None,
            with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return log-probability, logsumexp and entropy (zeros if not asked for), each [n]."""
    logprob, logsumexp, entropy = (hidden.new_zeros(len(hidden), dtype=wide(hidden)) for _ in range(3))
    wide_weight = weight.to(wide(weight))
    for rows in _chunks(len(hidden), len(weight)):
        z = _logits(hidden[rows], wide_weight, bias, softcap)
        logsumexp[rows] = z.logsumexp(1)
        logprob[rows] = z.gather(1, target[rows, None])[:, 0] - logsumexp[rows]
        if with_entropy:
            log_p = z.sub_(logsumexp[rows, None])
            entropy[rows] = -log_p.exp().mul_(log_p).sum(1)
    return logprob, logsumexp, entropy


def backward(grad_logprob: Tensor, grad_entropy: Tensor | None, saved: list[Any], softcap: float | None,
             needs: list[bool]) -> list[Tensor]:  # fmt: skip
    """Return the gradients of those of hidden, weight and bias that `needs` marks."""
    hidden, weight, target, bias, logsumexp, entropy = saved
    asked = zip((hidden, weight, bias), needs, strict=True)
    grad_hidden, grad_weight, grad_bias = (x.new_zeros(x.shape, dtype=wide(x)) if need else None for x, need in asked)
    wide_weight = weight.to(wide(weight))
    for rows in _chunks(len(hidden), len(weight)):
        z = _logits(hidden[rows], wide_weight, bias, softcap)
        log_p = z - logsumexp[rows, None]
        # d logprob / dz_j = onehot_j - p_j  and  d entropy / dz_j = -p_j (log p_j + entropy)
        slope = grad_logprob[rows, None]
        if grad_entropy is not None:
            slope = (log_p + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(slope)
        dz = log_p.exp_().mul_(slope).neg_()
        dz.scatter_add_(1, target[rows, None], grad_logprob[rows, None])
        if softcap is not None:
            dz *= 1 - z.div_(softcap).square_()
        if grad_hidden is not None:
            grad_hidden[rows] = dz @ wide_weight
        if grad_weight is not None:
            grad_weight.addmm_(dz.T, hidden[rows].to(dz.dtype))
        if grad_bias is not None:
            grad_bias += dz.sum(0)
    return [grad.to(hidden.dtype) for grad in (grad_hidden, grad_weight, grad_bias) if grad is not None]


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _logits(hidden: Tensor, wide_weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden.to(wide_weight.dtype) @ wide_weight.T
    if bias is not None:
        z += bias
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, TILE // max(1, vocabulary))
    return (slice(start, start + step) for start in range(0, tokens, step))
