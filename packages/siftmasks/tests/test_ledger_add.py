"""The ledger adds integers: in any order, on every back end, and what is taken out leaves no trace."""

import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.random import key
from siftmasks.bits import unpack_bits
from siftmasks.ops.ledger_add import ledger_add, ledger_add_levels, ledger_subtract, quantize_difference
from siftmasks.signs import sign_vector

# The interpreter of Triton runs on NumPy, which tells of overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32]
STEP = 2.0**-7
triton_ledger = pytest.importorskip("siftmasks.ops.ledger_add.triton")


def task_vector(size, seed=0):
    """Half of it zero, some of it exactly between two levels, some beyond the largest level of 8 bits."""
    generator = torch.Generator().manual_seed(100 * size + seed)
    tau = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    halves = (torch.randint(-40, 40, (size,), generator=generator) + 0.5) * STEP
    return torch.where(torch.rand(size, generator=generator) < 0.2, halves, tau)


def ledger(size, total=torch.uint16, count=torch.uint8, device="cpu"):
    return [torch.zeros(size, dtype=dtype, device=device) for dtype in (total, count, total)]


def add(tau, books, *, bits=8, signed=False):
    return ledger_add(tau, books[0], books[1], step=STEP, bits=bits, positive=books[2] if signed else None)


def subtract(levels, packed, books, *, signed=False):
    return ledger_subtract(levels, *books[:2], **({"signs": packed, "positive": books[2]} if signed else {}))


def same(found, expected):
    return all(a == b if isinstance(a, int) else torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("signed", [False, True], ids=["sift", "signs"])
@pytest.mark.parametrize(
    ("bits", "total", "count"),
    [
        (1, torch.uint8, torch.uint8), (6, torch.uint8, torch.uint16), (8, torch.uint16, torch.uint8),
        (8, torch.uint32, torch.uint16), (12, torch.uint16, torch.uint32), (16, torch.uint32, torch.uint32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("size", [0, 1, 31, 63, 4096, 5001])
def test_back_ends_are_bit_equal_to_the_reference(size, bits, total, count, signed, backend, monkeypatch):
    results = []
    for name in ("reference", backend):
        monkeypatch.setenv("LMCORE_BACKEND", name)
        device = DEVICE if name == "triton" else "cpu"
        books = ledger(size, total, count, device)
        added = [add(task_vector(size, seed).to(device), books, bits=bits, signed=signed) for seed in range(3)]
        removed = subtract(*added[1][:2], books, signed=signed)
        refused = subtract(*added[1][:2], books, signed=signed) if size > 1 else 0
        results.append([*books, *(part for one in added for part in one), removed, refused])
    assert same(results[1], [part if isinstance(part, int) else part.cpu() for part in results[0]])


@pytest.mark.parametrize("bits", [1, 8, 15])
def test_levels_are_the_nearest_half_to_even_in_exact_arithmetic(bits):
    tau = task_vector(5001)
    levels, _, saturated = add(tau, ledger(5001, torch.uint16), bits=bits)
    exact = [round(abs(Fraction(value)) / Fraction(STEP)) for value in tau.tolist()]  # round() of a Fraction is half to even
    assert levels.tolist() == [min(level, 2**bits - 1) for level in exact]
    assert saturated == sum(level > 2**bits - 1 for level in exact)


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
def test_saturation_begins_where_rounding_would_leave_the_grid(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    edge = torch.tensor(255.5) * STEP
    tau = torch.stack([edge, edge.nextafter(torch.tensor(0.0)), -edge, torch.tensor(3e38), torch.tensor(-1e-45)])
    levels, packed, saturated = add(tau, ledger(5))
    assert (levels.tolist(), saturated) == ([255, 255, 255, 255, 0], 3)
    assert packed.tolist() == [0b01111]


@pytest.mark.parametrize("step", [2.0**-126, 2.0**126])
def test_the_smallest_and_the_largest_grid(step):
    tau = torch.tensor([step, -1.5 * step, 2.5 * step, 0.25 * step])
    total, count, _ = ledger(4)
    levels, _, _ = ledger_add(tau, total, count, step=step, bits=8)
    assert levels.tolist() == [1, 2, 2, 0]


def test_the_packed_bits_are_the_mask_or_the_signs_lowest_bit_first():
    tau = task_vector(61)
    tau[:3] = torch.tensor([STEP / 4, -STEP, STEP])  # too small for a level, but it has a sign
    levels, mask, _ = add(tau, ledger(61))
    assert torch.equal(unpack_bits(mask, 61), levels.int() > 0)
    assert mask[-1] >> 5 == 0, "bits beyond the size are 0"
    books = ledger(61)
    same_levels, signs, _ = add(tau, books, signed=True)
    assert torch.equal(same_levels, levels)
    assert torch.equal(unpack_bits(signs, 61), tau > 0)
    assert torch.equal(books[2].int(), levels.int() * (tau > 0))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from([1, 6, 8, 12]), st.booleans(), st.randoms(use_true_random=False))
def test_any_order_of_adding_and_removing_ends_at_the_same_ledger(tasks, size, bits, signed, order: random.Random):
    added = [add(task_vector(size, seed), ledger(size), bits=bits, signed=signed)[:2] for seed in range(tasks)]
    kept = order.sample(range(tasks), order.randint(0, tasks))
    fresh, worn = ledger(size), ledger(size)
    for task in kept:
        add(task_vector(size, task), fresh, bits=bits, signed=signed)
    # All tasks come in some order; each that is not kept leaves at some point after it came.
    waiting, present = order.sample(range(tasks), tasks), []
    while waiting or present:
        if waiting and (not present or order.random() < 0.5):
            task = waiting.pop()
            levels, packed = added[task]
            ledger_add_levels(levels, *worn[:2], **({"signs": packed, "positive": worn[2]} if signed else {}))
            present += [task] if task not in kept else []
        else:
            assert subtract(*added[present.pop(order.randrange(len(present)))], worn, signed=signed) == 0
    assert all(torch.equal(a, b) for a, b in zip(worn, fresh, strict=True))


def test_float_sums_keep_a_trace_where_the_ledger_keeps_none():
    """What the integers are for."""
    vectors = [torch.randn(5000) for _ in range(20)]
    summed = sum(vectors[1:], torch.zeros(5000))
    removed = sum(vectors, torch.zeros(5000)) - vectors[0]
    assert (removed != summed).double().mean() > 0.1


def test_a_ledger_of_as_many_tasks_as_it_holds_does_not_overflow():
    total, count, _ = ledger(3)
    for _ in range(255):
        ledger_add_levels(torch.full((3,), 255, dtype=torch.uint8), total, count)
    assert total.tolist() == [255 * 255] * 3
    assert count.tolist() == [255] * 3


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
def test_an_underflow_changes_nothing_and_is_counted(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    total = torch.tensor([5, 5, 0, 9, 2**32 - 1], dtype=torch.uint32)
    count = torch.tensor([1, 1, 0, 0, 2], dtype=torch.uint16)
    before = total.clone(), count.clone()
    levels = torch.tensor([5, 6, 0, 1, 255], dtype=torch.uint8)
    assert ledger_subtract(levels, total, count) == 2  # the second is too large, the fourth was never counted
    assert torch.equal(total, before[0])
    assert torch.equal(count, before[1])
    fits = torch.tensor([5, 0, 0, 0, 255], dtype=torch.uint8)
    assert ledger_subtract(fits, total, count) == 0
    assert total.tolist() == [0, 5, 0, 9, 2**32 - 256]
    assert count.tolist() == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
def test_levels_of_the_wrong_sign_underflow(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    books = ledger(2)
    levels, signs, _ = add(torch.tensor([3 * STEP, -3 * STEP]), books, signed=True)
    assert signs.tolist() == [0b01]
    before = [book.clone() for book in books]
    assert subtract(levels, torch.tensor([0b10], dtype=torch.uint8), books, signed=True) == 2
    assert all(torch.equal(a, b) for a, b in zip(books, before, strict=True))
    assert subtract(levels, signs, books, signed=True) == 0
    assert not any(book.int().any() for book in books)


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_coordinates_that_are_not_finite_are_refused_before_anything_changes(strange, backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    tau = task_vector(5001)
    tau[[0, 4999]] = strange
    books = ledger(5001)
    with pytest.raises(ValueError, match="task_vector holds 2 of 5001 coordinates that are NaN or infinite"):
        add(tau, books, signed=True)
    assert not any(book.int().any() for book in books)


def test_the_number_of_threads_changes_nothing():
    tau, before, found = task_vector(300_001), numba.get_num_threads(), []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            books = ledger(300_001)
            found.append([*add(tau, books, signed=True), *(book.clone() for book in books)])
            found[-1].append(subtract(*found[-1][:2], books, signed=True))
    finally:
        numba.set_num_threads(before)
    assert same(found[0], found[-1])


def test_a_task_vector_may_have_any_strides_but_the_ledger_must_be_contiguous():
    tau, total, count = task_vector(48).view(6, 8), *(book.view(8, 6) for book in ledger(48)[:2])
    levels, _, _ = ledger_add(tau.T, total, count, step=STEP, bits=8)
    assert torch.equal(levels, add(tau.T.contiguous().flatten(), ledger(48))[0].view(8, 6))
    assert ledger_subtract(levels.T.contiguous().T, total, count) == 0
    assert not total.int().any()
    with pytest.raises(ValueError, match="total changes in place: it must be contiguous"):
        ledger_add(tau, total.T, count.T.contiguous(), step=STEP, bits=8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"task_vector": torch.zeros(4, dtype=torch.bfloat16)},
            r"task_vector is torch.bfloat16 \(4,\) on cpu: expected torch.float32",
        ),
        ({"task_vector": torch.zeros(5)}, r"task_vector is torch.float32 \(5,\) on cpu: expected torch.float32 \(4,\)"),
        ({"total": torch.zeros(4, dtype=torch.int32)}, r"total is torch.int32 \(4,\) on cpu: expected torch.uint8 or"),
        ({"count": torch.zeros(5, dtype=torch.uint8)}, r"count is torch.uint8 \(5,\)"),
        ({"positive": torch.zeros(4, dtype=torch.uint8)}, r"positive is torch.uint8 \(4,\) on cpu: expected torch.uint16"),
        ({"step": 0.3}, "step is 0.3: expected a power of two"),
        ({"bits": 17}, "bits is 17"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    total, count, _ = ledger(4)
    given = {"task_vector": torch.zeros(4), "total": total, "count": count, "step": STEP, "bits": 8} | changed
    with pytest.raises(ValueError, match=message):
        ledger_add(given.pop("task_vector"), given.pop("total"), given.pop("count"), **given)


@pytest.mark.parametrize("change", [ledger_add_levels, ledger_subtract])
def test_levels_and_signs_that_do_not_fit_are_refused(change):
    total, count, positive = ledger(9)
    levels, signs = torch.zeros(9, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"levels is torch.uint32 \(9,\) on cpu: expected torch.uint8 or torch.uint16"):
        change(levels.to(torch.uint32), total, count)
    with pytest.raises(ValueError, match="signs and positive come together"):
        change(levels, total, count, signs=signs)
    with pytest.raises(ValueError, match="signs and positive come together"):
        change(levels, total, count, positive=positive)
    with pytest.raises(ValueError, match=r"signs is torch.uint8 \(1,\) on cpu: expected torch.uint8 \(2,\)"):
        change(levels, total, count, signs=signs[:1], positive=positive)


def tuned(size, dtype, base_dtype):
    """A base, and a fine-tune of it of which a part moved exactly half a level."""
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).to(base_dtype)
    return (base.float() + task_vector(size)).to(dtype), base


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("words", [None, (7, 2**31)], ids=["signs", "sift"])
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize(
    ("dtype", "base_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", None)]
)
@pytest.mark.parametrize("size", [0, 1, 63, 5001, 70_001])
def test_the_difference_to_a_base_is_quantised_to_the_same_bits_by_all_back_ends(
    size, dtype, base_dtype, bits, words, backend, monkeypatch
):
    weight, base = tuned(size, getattr(torch, dtype), getattr(torch, base_dtype or "float32"))
    found = []
    for name in ("reference", backend):
        monkeypatch.setenv("LMCORE_BACKEND", name)
        tensors = [tensor.to(DEVICE if name == "triton" else "cpu") for tensor in (weight, base)]
        found.append(quantize_difference(tensors[0], tensors[1] if base_dtype else None, key=words, step=STEP, bits=bits))
    assert same(found[1][:3], found[0][:3])
    assert found[1][3:] == pytest.approx(found[0][3:], rel=1e-12)


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_the_difference_is_what_ledger_add_makes_of_the_task_vector_along_the_sign_vector(mode):
    weight, base = tuned(5001, torch.bfloat16, torch.bfloat16)
    difference = weight.float() - base.float()
    along = difference * (sign_vector(3, "w", [5001]) * difference > 0) if mode == "sift" else difference
    books = ledger(5001)
    levels, packed, saturated = add(along, books, signed=mode == "signs")
    found = quantize_difference(weight, base, key=key(3, "w") if mode == "sift" else None, step=STEP, bits=8)
    assert same(found[:3], (levels, packed, saturated))
    assert found[3:] == pytest.approx([tensor.double().square().sum().item() for tensor in (difference, along)])
    again = ledger(5001)
    ledger_add_levels(found.levels, *again[:2], **({"signs": found.bits, "positive": again[2]} if mode == "signs" else {}))
    assert same(again, books)


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
def test_a_difference_that_is_not_finite_is_refused_also_where_the_key_would_drop_it(backend, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    largest = torch.finfo(torch.float32).max
    weight, base = torch.tensor([float("nan"), float("inf"), -float("inf"), largest, 1.0]), torch.tensor([0, 0, 0, -largest, 0])
    with pytest.raises(ValueError, match="weight - base holds 4 of 5 coordinates that are NaN or infinite"):
        quantize_difference(weight, base, key=(0, 0), step=STEP, bits=8)


def test_quantising_reads_any_strides_and_changes_nothing():
    weight, base = (tensor.view(6, 8) for tensor in tuned(48, torch.float32, torch.float32))
    before = weight.clone(), base.clone()
    found = quantize_difference(weight.T, base.T, key=(1, 2), step=STEP, bits=8)
    whole = quantize_difference(weight.T.contiguous(), base.T.contiguous(), key=(1, 2), step=STEP, bits=8)
    assert same(found[:3], whole[:3])
    quantize_difference(weight, None, key=(1, 2), step=STEP, bits=8)
    assert torch.equal(weight, before[0])
    assert torch.equal(base, before[1])


def test_threads_of_the_caller_get_the_same_bits():
    weight, base = tuned(300_001, torch.bfloat16, torch.bfloat16)
    alone = quantize_difference(weight, base, key=(1, 2), step=STEP, bits=8)
    with ThreadPoolExecutor(3, initializer=numba.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(lambda _: quantize_difference(weight, base, key=(1, 2), step=STEP, bits=8), range(6)))
    assert all(same(one[:3], alone[:3]) and one[3:] == alone[3:] for one in found)


@pytest.mark.parametrize(
    ("weight", "base", "message"),
    [
        (
            torch.zeros(4, dtype=torch.float64),
            torch.zeros(4),
            r"weight is torch.float64 \(4,\) on cpu: expected torch.float32 or",
        ),
        (torch.zeros(4), torch.zeros(5), r"base is torch.float32 \(5,\) on cpu: expected .* \(4,\)"),
    ],
)
def test_a_weight_and_a_base_that_do_not_fit_are_refused(weight, base, message):
    with pytest.raises(ValueError, match=message):
        quantize_difference(weight, base, key=None, step=STEP, bits=8)
