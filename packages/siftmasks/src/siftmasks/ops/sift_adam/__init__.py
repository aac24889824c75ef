"""One step of sign-fixed tuning: Adam, projection and the new weights in one pass over memory."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from siftmasks.ops.arguments import FLOATS, expect, expect_in_place


def sift_adam(
    weight: Tensor,
    base: Tensor,
    task_vector: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    key: tuple[int, int] | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """Move a task vector τ by one step of Adam, set what left the sign vector v to 0, and refresh the weights, all in place.

        m <- beta1 m + (1 - beta1) g
        s <- beta2 s + (1 - beta2) g g
        τ <- τ - learning_rate / (1 - beta1^step) m / (√s / √(1 - beta2^step) + eps)
        τ <- 0 where τ v <= 0
        weight <- base + τ, rounded once to its dtype

    `exp_avg` is m and `exp_avg_sq` is s; neither is reset where τ is. They and τ are float32, and so is all arithmetic, each operation
    rounded once from left to right (division by √(1 - beta2^step) multiplies by its inverse): the same bits from every back end, whatever
    the number of threads. v is made of `key = lmcore.random.key(seed, name)` as in `siftmasks.signs`, one random word per 32 weights;
    without a key nothing is projected. A gradient that is NaN or infinite makes NaN of its coordinate of τ, which no projection hides and
    `ledger_add` refuses.

    Moves 24 bytes of τ, m and s, one gradient, one base weight and one weight: 30 to 36 per weight, the limit being memory bandwidth; fuses
    what takes Adam, a comparison, two products, a sum and a cast.

    >>> weight, base, τ, m, s = (torch.zeros(4) for _ in range(5))
    >>> sift_adam(weight, base, τ, m, s, torch.ones(4), key=(0, 0), learning_rate=0.1, beta1=0.9, beta2=0.999, eps=1e-8, step=1)
    >>> weight  # a positive gradient moves the weights whose sign is negative
    tensor([ 0.0000, -0.1000,  0.0000, -0.1000])

    Shapes: all equal, any rank. Dtypes: `weight` and `base` share float32, bfloat16 or float16; `grad` is any float, made float32 first.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit, or that would change in place but is not contiguous;
    also for a `step` below 1, a beta outside [0, 1), an `eps` that is not positive or a negative `learning_rate`.
    Source: SIFT-Masks, Kuo et al. 2025, §3 (the projection follows each optimizer step, as in its text); Adam, Kingma and Ba 2015.
    """
    expect_in_place("weight", weight, weight, *FLOATS)
    expect("base", base, weight, weight.dtype)
    expect("grad", grad, weight, *FLOATS, torch.float64)
    for name, tensor in {"task_vector": task_vector, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        expect_in_place(name, tensor, weight, torch.float32)
    if (
        step < 1
        or not (0 <= beta1 < 1 and 0 <= beta2 < 1)
        or not (0 < eps < float("inf") and 0 <= learning_rate < float("inf"))
    ):
        rule = "expected step >= 1, betas in [0, 1), eps positive, learning_rate not negative, both finite"
        raise ValueError(f"step {step}, betas {beta1} and {beta2}, eps {eps}, learning_rate {learning_rate}: {rule}")
    step_size, rescale = learning_rate / (1 - beta1**step), (1 - beta2**step) ** -0.5
    if grad.dtype == torch.float64:
        grad = grad.float()
    with torch.no_grad():
        pick(__name__, weight).sift_adam(
            weight, base.contiguous(), task_vector, exp_avg, exp_avg_sq, grad.contiguous(),
            key, (beta1, 1 - beta1, beta2, 1 - beta2, step_size, rescale, eps),
        )  # fmt: skip
