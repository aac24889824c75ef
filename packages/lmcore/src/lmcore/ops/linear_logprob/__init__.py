"""The log-probability of each token under a language model's linear head, without ever holding the logits."""

from itertools import compress
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lmcore.dispatch import pick
from lmcore.ops.linear_logprob import reference


@overload
def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ...,
                   softcap: float | None = ...) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ...,
                   softcap: float | None = ..., *, return_entropy: Literal[True]) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
                   softcap: float | None = None, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute log p(target) (nats, <= 0) and, on request, the entropy of p (nats, >= 0), for p = softmax(z) of a linear head.

        z_j = hidden · weight_j + bias_j,  then  z_j <- softcap tanh(z_j / softcap)  where a softcap is given
        logprob = z_target - log Σ_j exp z_j,  entropy = -Σ_j p_j log p_j

    >>> hidden, weight, target = torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([0, 3])
    >>> linear_logprob(hidden, weight, target)
    tensor([-1.3863, -1.3863])
    >>> linear_logprob(hidden, weight, target, bias=torch.tensor([2.0, 0, 0, 0]), return_entropy=True)
    (tensor([-0.3408, -2.3408]), tensor([0.9183, 0.9183]))

    Shapes: `hidden` [n, d], `weight` [V, d], `target` [n] int64, `bias` [V], any strides; the results [n], not reduced. No label is
    ignored: select the tokens that count before the call, and the others cost nothing. `torch.compile` takes the op whole.
    Dtypes: `hidden`, `weight` and `bias` share float32, bfloat16, float16 or float64 (always on the reference). Arithmetic and results are
    float32 (float64 for float64). Gradients (first order only, and only those needed) are rounded once at the end; kernels also round the
    logits' gradients to a half dtype, as the head's own backward would: float16 wants its usual loss scaling. Cost: 2 n V d FLOPs forward;
    backward 2 n V d to recompute the logits and per matrix gradient. The limit is arithmetic (few tokens: reading the weight). Memory past
    inputs and results: some tiles of `reference.TILE` logits or one of `triton.TILE`, floats per token, float32 copies of half inputs.
    Kernels fuse product, bias, softcap, logsumexp, entropy and choice of the target. Raises: `ValueError` naming the argument whose shape,
    dtype or device does not fit, or a target outside [0, V): on a GPU, which would have to wait for it, NaN. Logits must be finite.
    Source: recomputed logits as in Cut Your Losses (Wijmans et al. 2024); online logsumexp after Milakov and Gimelshein 2018.
    """
    _check(hidden, weight, target, bias, softcap)
    logprob, _, entropy = _forward(hidden, weight, target, bias, softcap, return_entropy)
    return (logprob, entropy) if return_entropy else logprob


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.ndim != 2 or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"hidden is {hidden.dtype} {tuple(hidden.shape)}: expected a float matrix [n, d]")
    (n, d), v, dtype = hidden.shape, tuple(weight.shape[:1]), hidden.dtype
    expected = {"weight": (weight, dtype, (*v, d)), "target": (target, torch.int64, (n,)), "bias": (bias, dtype, v)}
    for name, (tensor, *wanted) in expected.items():
        if tensor is not None and [tensor.dtype, tuple(tensor.shape), tensor.device] != [*wanted, hidden.device]:
            came = f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{came}: expected {wanted[0]} {wanted[1]} on {hidden.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: expected a positive number or None")


# Operators of torch's own registry, so that a compiler takes them whole instead of unrolling the loops inside.
@torch.library.custom_op("lmcore::linear_logprob", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None,
             with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outside = target[:0] if target.is_cuda else target[(target < 0) | (target >= len(weight))]
    if len(outside):
        raise ValueError(f"target holds {outside[0]}: expected values in [0, {len(weight)})")
    return _backend(hidden).forward(hidden, weight, target, bias, softcap, with_entropy)


@torch.library.custom_op("lmcore::linear_logprob_backward", mutates_args=())
def _backward(grad_logprob: Tensor, grad_entropy: Tensor | None, saved: list[Tensor | None], softcap: float | None,
              needs: list[bool]) -> list[Tensor]:  # fmt: skip
    return _backend(grad_logprob).backward(grad_logprob, grad_entropy, saved, softcap, needs)


def _backend(tensor: Tensor) -> ModuleType:
    return reference if tensor.dtype == torch.float64 else pick(__name__, tensor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softcap, ctx.with_entropy = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad_logprob: Tensor, _: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[argument] for argument in (0, 1, 3)]
    grads = iter(_backward(grad_logprob, grad_entropy if ctx.with_entropy else None, ctx.saved_tensors, ctx.softcap, needs))
    hidden, weight, bias = (next(grads) if need else None for need in needs)
    return hidden, weight, None, bias, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_forward.register_fake(lambda hidden, *_: tuple(hidden.new_empty(len(hidden), dtype=reference.wide(hidden)) for _ in range(3)))
_backward.register_fake(lambda *args: [x.new_empty(x.shape) for x in compress((*args[2][:2], args[2][3]), args[4])])
