"""Each row of a batch meets the delta of its own task, as if it were alone."""

import numba
import pytest
import torch

from siftmasks.bits import unpack_bits
from siftmasks.ops.masked_delta_mm import masked_delta_mm
from siftmasks.ops.masked_delta_mm import numba as numba_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "numba", "triton"])
def device(request, monkeypatch):
    """Runs a test once on each back end; returns the device of its tensors."""
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    return DEVICE if request.param == "triton" else "cpu"


def batch(n, width, height, tasks, dtype=torch.float32, device="cpu"):
    """Return x, delta, bits and the task of each row, -1 among them."""
    generator = torch.Generator().manual_seed(n + width)
    x = torch.randn(n, width, generator=generator).to(dtype)
    delta = (torch.randn(height, width, generator=generator) * 0.01).to(dtype)
    bits = torch.randint(0, 256, (tasks, (height * width + 7) // 8), generator=generator, dtype=torch.uint8)
    return [tensor.to(device) for tensor in (x, delta, bits, torch.randint(-1, tasks, (n,), generator=generator))]


def row_by_row(x, delta, bits, task_of_row, signed):
    """Return the products in float64, and the sums of absolute values that bound their rounding."""
    rows, bounds = [], []
    for row, task in zip(x.cpu().double(), task_of_row.tolist(), strict=True):
        mask = torch.ones_like(delta, dtype=torch.float64, device="cpu")
        if task >= 0:
            mask = unpack_bits(bits[task].cpu(), delta.numel()).view(delta.shape).double()
            mask = 2 * mask - 1 if signed else mask
        chosen = delta.cpu().double() * mask
        rows.append(chosen @ row)
        bounds.append(chosen.abs() @ row.abs())
    shape = len(x), len(delta)
    return torch.stack(rows).view(shape), torch.stack(bounds).view(shape)


@pytest.mark.parametrize("signed", [False, True], ids=["sift", "signs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width", "height", "tasks"), [(1, 1, 1, 1), (3, 31, 63, 2), (40, 64, 65, 3), (17, 77, 70, 20)])
def test_rows_are_those_of_exact_arithmetic(n, width, height, tasks, dtype, signed, device):
    x, delta, bits, task_of_row = batch(n, width, height, tasks, dtype, device)
    found = masked_delta_mm(x, delta, bits, task_of_row, signed=signed)
    exact, bound = row_by_row(x, delta, bits, task_of_row, signed)
    assert (found.shape, found.dtype) == ((n, height), dtype)
    error = (found.cpu().double() - exact).abs()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + width * 2.0**-24 * bound + smallest).all()


def test_rows_of_one_task_beyond_the_few_go_through_a_matrix_product(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "numba")
    monkeypatch.setattr(numba_kernel, "FEW", 2)
    x, delta, bits, _ = batch(9, 40, 33, 3)
    task_of_row = torch.tensor([1, 0, 1, 2, 1, -1, 2, 1, -1])
    exact, bound = row_by_row(x, delta, bits, task_of_row, False)
    error = (masked_delta_mm(x, delta, bits, task_of_row).double() - exact).abs()
    assert (error <= 41 * 2.0**-24 * bound).all()


def test_masked_out_weights_count_for_nothing_and_a_row_without_task_takes_all(device):
    x, delta, bits, _ = batch(4, 50, 20, 2, device=device)
    bits[0], bits[1] = 0, 255
    found = masked_delta_mm(x, delta, bits, torch.tensor([0, 1, -1, 0], device=device))
    whole = masked_delta_mm(x, delta, bits, torch.full((4,), -1, device=device))
    assert not found[[0, 3]].any()
    torch.testing.assert_close(found[[1, 2]], whole[[1, 2]])


@pytest.mark.parametrize(("n", "width", "height"), [(0, 5, 3), (3, 0, 5), (3, 5, 0)])
def test_empty_tensors(n, width, height, device):
    x, delta, bits, task_of_row = batch(n, width, height, 2, device=device)
    found = masked_delta_mm(x, delta, bits, task_of_row)
    assert found.shape == (n, height)
    assert not found.any()


def test_a_store_without_tasks_serves_the_model_without_a_mask(device):
    x, delta = torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)
    none, maskless = torch.empty(0, 5, dtype=torch.uint8, device=device), torch.full((3,), -1, device=device)
    torch.testing.assert_close(masked_delta_mm(x, delta, none, maskless), x @ delta.T)


def test_inputs_may_have_any_strides(device):
    x, delta, bits, task_of_row = batch(12, 24, 16, 3, device=device)
    expected = masked_delta_mm(x, delta, bits, task_of_row)
    strided = [x.T.contiguous().T, delta.T.contiguous().T, bits.T.contiguous().T, task_of_row.repeat_interleave(2)[::2]]
    torch.testing.assert_close(masked_delta_mm(*strided), expected, rtol=0, atol=0)


def test_the_number_of_threads_changes_nothing():
    tensors, before, found = batch(8, 100, 300, 3), numba.get_num_threads(), []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            found.append(masked_delta_mm(*tensors))
    finally:
        numba.set_num_threads(before)
    assert torch.equal(found[0], found[-1])


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(3), r"x is torch.float32 \(3,\), delta \(5, 8\), bits \(2, 5\): expected"),
        (0, torch.zeros(3, 8, dtype=torch.float64), r"x is torch.float64 \(3, 8\)"),
        (1, torch.zeros(5, 9), r"delta is torch.float32 \(5, 9\) on cpu: expected torch.float32 \(5, 8\) on cpu"),
        (1, torch.zeros(5, 8, dtype=torch.float16), r"delta is torch.float16 \(5, 8\)"),
        (2, torch.zeros(2, 6, dtype=torch.uint8), r"bits is torch.uint8 \(2, 6\) on cpu: expected torch.uint8 \(2, 5\)"),
        (3, torch.zeros(4, dtype=torch.int64), r"task_of_row is torch.int64 \(4,\) on cpu: expected torch.int64 \(3,\)"),
        (3, torch.tensor([0, 1, 2]), "task_of_row goes from 0 to 2: expected -1 to 1"),
        (3, torch.tensor([0, -2, 1]), "task_of_row goes from -2 to 1: expected -1 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(place, tensor, message):
    tensors = [torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)]
    tensors[place] = tensor
    with pytest.raises(ValueError, match=message):
        masked_delta_mm(*tensors)
