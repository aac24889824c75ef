"""The step of sign-fixed tuning as formulas: the oracle of the kernels, bit for bit."""

from torch import Tensor

from siftmasks.ops.reference import signs


def sift_adam(
    weight: Tensor, base: Tensor, task_vector: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor,
    key: tuple[int, int] | None, constants: tuple[float, ...],
) -> None:  # fmt: skip
    """Change all but `base` and `grad` in place; every operation rounds once to float32."""
    beta1, rest1, beta2, rest2, step_size, rescale, eps = constants
    g = grad.float()
    exp_avg.copy_(beta1 * exp_avg + rest1 * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + rest2 * g * g)
    root = exp_avg_sq.double().sqrt().float()  # correctly rounded, which the float32 root of torch on a CPU is not always
    task_vector.sub_(step_size * exp_avg / (root * rescale + eps))
    if key is not None:
        task_vector.masked_fill_(task_vector * signs(key, task_vector.shape, g.device) <= 0, 0)
    weight.copy_(base.float() + task_vector)
