import math

import pytest
import torch

from siftmasks.baselines import VectorsInMemory, average
from siftmasks.memory_ledger import MemoryLedger
from siftmasks.settings import SiftSettings
from siftmasks.signs import sign_vector

SHAPES = {"w": (7, 9), "b": (5,)}
SETTINGS = {mode: SiftSettings(learning_rate=0.01, steps=20, mode=mode) for mode in ("sift", "signs")}


def task_vectors(tasks, mode):
    generator = torch.Generator().manual_seed(3)
    vectors = {}
    for task in range(tasks):
        vectors[f"task {task}"] = {}
        for name, shape in SHAPES.items():
            tau = torch.randn(shape, generator=generator) * 0.05
            vectors[f"task {task}"][name] = tau * (tau * sign_vector(0, name, shape) > 0) if mode == "sift" else tau
    return vectors


@pytest.fixture(params=["sift", "signs"])
def learned(request):
    vectors = task_vectors(5, request.param)
    ledger = MemoryLedger(SETTINGS[request.param], vectors["task 0"], max_tasks=5)
    for task, vector in vectors.items():
        ledger.learn(task, vector)
    return ledger, vectors


def on_grid(vectors, ledger):
    """The task vectors rounded to the grid, float64: task x coordinates, with their own signs."""
    step = ledger.settings.grid.step
    flat = torch.stack([torch.cat([tensor.flatten() for tensor in vector.values()]) for vector in vectors.values()]).double()
    return (flat / step).round() * step


def rows(served, tasks):
    return torch.stack([torch.cat([served.vector(task, name).flatten() for name in SHAPES]) for task in tasks]).double()


def test_read_gives_the_task_vectors_on_the_grid(learned):
    ledger, vectors = learned
    read = torch.stack([torch.cat([ledger.read(task, name).flatten() for name in ledger.names]) for task in ledger.tasks])
    assert torch.equal(read.double(), on_grid(vectors, ledger))
    assert ledger.saturated == 0


@pytest.mark.parametrize("scale", ["mean", "density", "count"])
def test_served_is_the_sum_of_magnitudes_under_the_bits_of_the_task(learned, scale):
    ledger, vectors = learned
    tau = on_grid(vectors, ledger)
    total, count = tau.abs().sum(0), (tau != 0).sum(0)
    divisor = {"mean": 5, "density": count.sum() / count.numel(), "count": count.clamp(min=1)}[scale]
    signed = ledger.settings.mode == "signs"
    own = torch.stack([torch.cat([tensor.flatten() for tensor in vector.values()]) for vector in vectors.values()])
    sign = torch.where(own > 0, 1.0, -1.0) if signed else tau.sign()
    torch.testing.assert_close(rows(ledger.served(scale), ledger.tasks), sign * total / divisor, rtol=1e-6, atol=0)


def test_user_without_a_mask_gets_the_average(learned):
    ledger, vectors = learned
    merged = average(VectorsInMemory(vectors))
    half_step = ledger.settings.grid.step / 2
    for name in SHAPES:
        torch.testing.assert_close(
            ledger.served("mean").vector(None, name), merged.vector(None, name), rtol=1e-5, atol=half_step
        )


def test_forgetting_leaves_the_ledger_of_the_others(learned):
    ledger, vectors = learned
    ledger.forget("task 2", dict(ledger.levels["task 2"]))
    fresh = MemoryLedger(ledger.settings, vectors["task 0"], max_tasks=5)
    for task in ("task 4", "task 0", "task 3", "task 1"):
        fresh.learn(task, vectors[task])
    for name in SHAPES:
        for part, tensor in ledger.parts[name].items():
            assert torch.equal(tensor, fresh.parts[name][part])
    assert ledger.tasks == ["task 0", "task 1", "task 3", "task 4"]
    assert ledger.differing() == 0


def test_levels_that_were_not_learned_are_refused_and_change_nothing(learned):
    ledger, _ = learned
    before = {name: {part: tensor.clone() for part, tensor in parts.items()} for name, parts in ledger.parts.items()}
    with pytest.raises(ValueError, match="task 1 is not what was learned"):
        ledger.forget("task 1", ledger.levels["task 3"])
    assert all(
        torch.equal(tensor, ledger.parts[name][part]) for name, parts in before.items() for part, tensor in parts.items()
    )
    assert len(ledger.tasks) == 5


def test_ledger_that_keeps_something_of_a_deleted_task_is_found(learned):
    ledger, _ = learned
    ledger.parts["w"]["total"].view(-1)[11] = int(ledger.parts["w"]["total"].view(-1)[11]) + 1
    assert ledger.differing() == 1


def test_density_is_the_share_of_weights_that_tasks_move(learned):
    ledger, vectors = learned
    moved = on_grid(vectors, ledger) != 0
    assert math.isclose(ledger.density, moved.double().mean().item())
