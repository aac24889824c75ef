"""One step of sign-fixed tuning: the same bits from every back end, Adam in exact arithmetic, and no coordinate against its sign."""

import numba
import pytest
import torch

from lmcore.random import key
from siftmasks.ops.sift_adam import sift_adam
from siftmasks.signs import sign_vector

# The interpreter of Triton runs on NumPy, which tells of overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = key(0, "weight")
ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def start(size, dtype=torch.float32, device="cpu"):
    """Return weight, base, task vector and the two moments before the first step."""
    base = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    return [tensor.to(device) for tensor in (base.clone(), base, *(torch.zeros(size) for _ in range(3)))]


def gradients(size, steps, dtype=torch.float32):
    """Gradients of many magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(size + 1)
    exponents = torch.randint(-12, 4, (steps, size), generator=generator)
    return (torch.randn(steps, size, generator=generator) * 2.0**exponents * (torch.rand(steps, size) < 0.9)).to(dtype)


def walk(state, grads, sign_key=KEY):
    for step, grad in enumerate(grads, 1):
        sift_adam(*state, grad, key=sign_key, step=step, **ADAM)
    return state


def bits(tensor):
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 63, 4096, 5001])
def test_back_ends_are_bit_equal_to_the_reference(size, dtype, grad_dtype, backend, monkeypatch):
    grads = gradients(size, 3, grad_dtype)
    for sign_key in (KEY, None):
        monkeypatch.setenv("LMCORE_BACKEND", "reference")
        expected = walk(start(size, dtype), grads, sign_key)
        monkeypatch.setenv("LMCORE_BACKEND", backend)
        device = "cpu" if backend == "numba" else DEVICE
        found = walk(start(size, dtype, device), grads.to(device), sign_key)
        for name, a, b in zip(("weight", "base", "task_vector", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
            assert torch.equal(bits(a), bits(b)), name


def test_twenty_steps_are_those_of_exact_arithmetic():
    grads, sign = gradients(5001, 20), sign_vector(0, "weight", (5001,)).double()
    tau, m, s, size_of_m = (torch.zeros(5001, dtype=torch.float64) for _ in range(4))
    for step, grad in enumerate(grads.double(), 1):
        m, size_of_m = 0.9 * m + (1 - 0.9) * grad, 0.9 * size_of_m + (1 - 0.9) * grad.abs()
        s = 0.999 * s + (1 - 0.999) * grad**2
        tau = tau - 1e-3 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        tau = tau * (tau * sign > 0)
    _, _, found, exp_avg, exp_avg_sq = walk(start(5001), grads)
    assert 0.2 < (tau != 0).double().mean() < 0.8
    torch.testing.assert_close(found.double(), tau, rtol=1e-5, atol=1e-8)
    roundings = 20 * 4 * 2.0**-24  # four operations a step, constants included, each within half a unit
    assert ((exp_avg.double() - m).abs() <= roundings * size_of_m).all()
    assert ((exp_avg_sq.double() - s).abs() <= roundings * s).all()


def test_without_a_key_it_is_adam_as_torch_has_it():
    grads = gradients(5001, 20)
    parameter = torch.zeros(5001, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1e-3)
    for grad in grads:
        parameter.grad = grad
        adam.step()
    torch.testing.assert_close(walk(start(5001), grads, None)[2], parameter.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_leaves_the_sign_vector_or_zero_and_keeps_the_moments(dtype):
    grads, sign = gradients(5001, 5), sign_vector(0, "weight", (5001,))
    weight, base, tau, m, s = walk(start(5001, dtype), grads)
    free = walk(start(5001, dtype), grads, None)
    assert ((tau == 0) | (tau * sign > 0)).all()
    assert not torch.signbit(tau[tau == 0]).any(), "what is projected is 0, not -0"
    assert (free[2] * sign < 0).double().mean() > 0.3, "there was something to project"
    assert torch.equal(m, free[3])
    assert torch.equal(s, free[4])
    assert torch.equal(weight, (base.float() + tau).to(dtype)), "the weight is rounded once"
    assert torch.equal(base, start(5001, dtype)[1]), "the base never changes"


def test_a_task_vector_outlives_steps_too_small_for_the_weights():
    """In bfloat16 a step of 1e-3 at a weight of 1 is lost; in the task vector it adds up."""
    state = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)] + [torch.zeros(64) for _ in range(3)]
    walk(state, -torch.ones(1, 64), None)
    assert torch.equal(state[0], torch.ones(64, dtype=torch.bfloat16))
    walk(state, -torch.ones(20, 64), None)
    assert (state[0] > 1).all()


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
def test_a_gradient_that_is_not_finite_is_not_hidden(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    grad = torch.tensor([float("nan"), float("inf"), 1.0, -1.0])
    weight, _, tau, _, _ = walk(start(4), grad[None])
    assert tau.isnan().tolist() == weight.isnan().tolist() == [True, True, False, False]


def test_the_number_of_threads_changes_nothing():
    grads, before = gradients(300_001, 2), numba.get_num_threads()
    found = []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            found.append(walk(start(300_001), grads))
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))


def test_pure_inputs_may_have_any_strides_and_parameters_may_require_gradients():
    weight, base, *state = (tensor.view(6, 8) for tensor in start(48))
    expected = walk([weight.clone(), base, *(tensor.clone() for tensor in state)], [torch.ones(6, 8)])
    parameter = torch.nn.Parameter(weight)
    walk([parameter, base.T.contiguous().T, *state], [torch.ones(8, 6).T.double()])
    assert torch.equal(parameter.detach(), expected[0])
    assert torch.equal(state[0], expected[2])


@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_what_changes_in_place_must_be_contiguous(place):
    tensors = [tensor.view(6, 8) for tensor in start(48)]
    tensors[place] = tensors[place].T.contiguous().T
    with pytest.raises(ValueError, match=r"(weight|task_vector|exp_avg|exp_avg_sq) changes in place: it must be contiguous"):
        sift_adam(*tensors, torch.ones(6, 8), key=KEY, step=1, **ADAM)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(4, dtype=torch.float64), r"weight is torch.float64 \(4,\) on cpu: expected torch.float32 or"),
        (1, torch.zeros(4, dtype=torch.float16), r"base is torch.float16 \(4,\) on cpu: expected torch.float32 \(4,\)"),
        (
            2,
            torch.zeros(4, dtype=torch.bfloat16),
            r"task_vector is torch.bfloat16 \(4,\) on cpu: expected torch.float32 \(4,\)",
        ),
        (3, torch.zeros(5), r"exp_avg is torch.float32 \(5,\) on cpu: expected torch.float32 \(4,\)"),
        (5, torch.zeros(4, dtype=torch.int64), r"grad is torch.int64 \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(place, tensor, message):
    tensors = [*start(4), torch.ones(4)]
    tensors[place] = tensor
    with pytest.raises(ValueError, match=message):
        sift_adam(*tensors, key=KEY, step=1, **ADAM)


@pytest.mark.parametrize(
    "changed",
    [{"step": 0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"learning_rate": float("nan")}, {"learning_rate": -1.0}],
)
def test_settings_outside_their_range_are_refused(changed):
    with pytest.raises(ValueError, match="expected step >= 1, betas in"):
        sift_adam(*start(4), torch.ones(4), key=KEY, **({"step": 1} | ADAM | changed))
