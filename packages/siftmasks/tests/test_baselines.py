"""Each method against numbers worked out by hand and against its formula over whole stacked vectors in float64."""

import weakref

import numpy as np
import pytest
import torch

from siftmasks import baselines
from siftmasks.baselines import VectorsInMemory
from siftmasks.baselines.vectors import magnitude_threshold

SHAPES = {"w": (7, 9), "b": (5,), "scalar": ()}
METHODS = {
    "average": baselines.average,
    "task_arithmetic": lambda vectors: baselines.task_arithmetic(vectors, 0.3),
    "ties": lambda vectors: baselines.ties(vectors, 0.4, 1.5),
    "dare": lambda vectors: baselines.dare(vectors, 0.7, 0.3),
    "breadcrumbs": lambda vectors: baselines.breadcrumbs(vectors, 0.3, 0.5, 0.9),
    "consensus": lambda vectors: baselines.consensus(vectors, 0.5, 2, 1.2),
    "tall_masks": lambda vectors: baselines.tall_masks(vectors, 0.5, 1.2),
    "emr": baselines.emr,
    "bitdelta": baselines.bitdelta,
    "mask_only": baselines.mask_only,
}


def random_vectors(tasks, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return VectorsInMemory(
        {
            f"task {task}": {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
            for task in range(tasks)
        }
    )


def vectors_of(**rows):
    return VectorsInMemory({task: {"w": torch.tensor(row)} for task, row in rows.items()})


def served(method, task="a"):
    return method.vector(task, "w").tolist()


# Two tasks, by hand.
A, B = [1.0, -2.0, 3.0, 0.0], [3.0, 1.0, -1.0, 0.0]


def test_average_and_task_arithmetic_by_hand():
    assert served(baselines.average(vectors_of(a=A, b=B))) == [2.0, -0.5, 1.0, 0.0]
    assert served(baselines.task_arithmetic(vectors_of(a=A, b=B), 2.0)) == [8.0, -2.0, 4.0, 0.0]


def test_ties_trims_globally_elects_a_sign_and_averages_those_that_agree_by_hand():
    # Half of four: a keeps 3 and -2, b keeps 3 and, being tied, 1 and -1. Sums 3, -1, 2, 0.
    assert served(baselines.ties(vectors_of(a=A, b=B), density=0.5)) == [3.0, -2.0, 3.0, 0.0]
    assert served(baselines.ties(vectors_of(a=A, b=B), density=1.0, scale=2.0)) == [4.0, -4.0, 6.0, 0.0]


def test_breadcrumbs_drops_the_smallest_and_the_largest_of_each_tensor_by_hand():
    # Order of magnitudes: a 0 1 -2 3, b 0 (1 -1) 3 with the earlier of the tied first; ranks 1 and 2 stay.
    assert served(baselines.breadcrumbs(vectors_of(a=A, b=B), scale=1.0, low=0.25, high=0.75)) == [1.0, -1.0, -1.0, 0.0]


def test_tall_masks_and_consensus_by_hand():
    # Average 2 -0.5 1 0; |tau_t| / |average - tau_t|: a 1 4/3 3/2 0, b 3 2/3 1/2 0. Half of the weights each.
    tall = baselines.tall_masks(vectors_of(a=A, b=B), density=0.5, scale=2.0)
    assert served(tall) == [0.0, -1.0, 2.0, 0.0]
    assert served(tall, "b") == [4.0, -1.0, 0.0, 0.0]
    assert served(tall, None) == [2.0, -0.5, 1.0, 0.0]
    assert served(baselines.consensus(vectors_of(a=A, b=B), density=0.5, scale=2.0)) == [0.0, -1.0, 0.0, 0.0]


def test_emr_by_hand():
    # Signs + - + 0, largest 3 2 3 0. a agrees everywhere: 6 / 8. b only with the first: 5 / 3.
    emr = baselines.emr(vectors_of(a=A, b=B))
    assert served(emr) == [2.25, -1.5, 2.25, 0.0]
    assert served(emr, "b") == pytest.approx([5.0, 0.0, 0.0, 0.0])
    assert served(emr, None) == [3.0, -2.0, 3.0, 0.0]


def test_bitdelta_and_mask_only_by_hand():
    assert served(baselines.bitdelta(vectors_of(a=A, b=B))) == [1.5, -1.5, 1.5, -1.5]
    assert served(baselines.mask_only(vectors_of(a=A, b=B))) == [2.0, -2.0, 2.0, 0.0]
    assert served(baselines.bitdelta(vectors_of(a=A, b=B)), None) == [0.0] * 4


def test_dare_keeps_the_expected_sum_and_depends_on_no_other_task():
    ones = vectors_of(a=[1.0] * 20_000, b=[1.0] * 20_000)
    both = baselines.dare(ones, drop=0.75, scale=1.0).vector(None, "w")
    assert set(both.tolist()) == {0.0, 4.0, 8.0}
    assert both.mean().item() == pytest.approx(2, abs=0.1)
    alone = {
        task: baselines.dare(vectors_of(**{task: [1.0] * 20_000}), drop=0.75, scale=1.0).vector(None, "w") for task in "ab"
    }
    assert torch.equal(both, alone["a"] + alone["b"])
    assert not torch.equal(alone["a"], alone["b"])
    other = baselines.dare(ones, drop=0.75, scale=1.0, seed=1).vector(None, "w")
    assert not torch.equal(both, other)


def dense(vectors):
    """All task vectors as rows of one matrix, float64."""
    rows = [torch.cat([vectors.read(task, name).flatten() for name in vectors.names]) for task in vectors.tasks]
    return torch.stack(rows).double().numpy()


def per_tensor(row):
    edges = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1]
    return np.split(row, edges)


def dense_ties(tau, density, scale):
    kept = np.sort(np.abs(tau), 1)[:, -round(density * tau.shape[1])]
    trimmed = tau * (np.abs(tau) >= kept[:, None])
    agree = trimmed * np.sign(trimmed.sum(0)) > 0
    return scale * (trimmed * agree).sum(0) / np.maximum(agree.sum(0), 1)


def dense_tall(tau, density):
    ratio = np.abs(tau) / np.abs(tau.mean(0) - tau)
    return ratio >= np.sort(ratio, 1)[:, -round(density * tau.shape[1])][:, None]


def dense_breadcrumbs(tau, low, high):
    total = np.zeros(tau.shape[1])
    for row in tau:
        parts = []
        for part in per_tensor(row):
            rank = np.abs(part).argsort().argsort()
            parts.append(part * (rank >= round(low * part.size)) * (rank < round(high * part.size)))
        total += np.concatenate(parts)
    return total


def dense_emr(tau):
    sign = np.sign(tau.sum(0))
    unified = sign * np.maximum(tau * sign, 0).max(0)
    masked = unified * (tau * unified > 0)
    return masked * (np.abs(tau).sum(1) / np.abs(masked).sum(1))[:, None]


def expected(method, tau):
    """What each task is served, a row each."""
    whole = np.ones((len(tau), 1))
    return {
        "average": lambda: whole * tau.mean(0),
        "task_arithmetic": lambda: whole * 0.3 * tau.sum(0),
        "ties": lambda: whole * dense_ties(tau, 0.4, 1.5),
        "breadcrumbs": lambda: whole * 0.3 * dense_breadcrumbs(tau, 0.5, 0.9),
        "consensus": lambda: whole * 1.2 * tau.mean(0) * (dense_tall(tau, 0.5).sum(0) >= 2),
        "tall_masks": lambda: 1.2 * tau.mean(0) * dense_tall(tau, 0.5),
        "emr": lambda: dense_emr(tau),
        "bitdelta": lambda: np.stack([np.concatenate([np.sign(p) * np.abs(p).mean() for p in per_tensor(row)]) for row in tau]),
    }[method]()


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dare", "mask_only"}))
def test_streaming_method_is_its_formula_over_stacked_vectors(method):
    vectors = random_vectors(6)
    result = METHODS[method](vectors)
    rows = [torch.cat([result.vector(task, name).flatten() for name in vectors.names]).numpy() for task in vectors.tasks]
    np.testing.assert_allclose(np.stack(rows), expected(method, dense(vectors)), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_survive_and_zero_vectors_do_not_become_nan(method):
    zero = VectorsInMemory({task: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for task in ("a", "b")})
    for vectors in (zero, random_vectors(1)):
        result = METHODS[method](vectors)
        for task in (vectors.tasks[0], None):
            for name, shape in SHAPES.items():
                tensor = result.vector(task, name)
                assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, shape)
                assert tensor.isfinite().all()


@pytest.mark.parametrize("method", ["average", "tall_masks", "emr", "bitdelta", "mask_only"])
def test_single_task_is_served_with_its_own_signs(method):
    vectors = random_vectors(1)
    result = {**METHODS, "tall_masks": lambda vectors: baselines.tall_masks(vectors, 1.0)}[method](vectors)
    for name in vectors.names:
        assert torch.equal(result.vector("task 0", name).sign(), vectors.read("task 0", name).sign())


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 1.0])
def test_threshold_is_the_exact_order_statistic_of_all_tensors_together(density):
    generator = torch.Generator().manual_seed(1)
    pieces = {
        "a": torch.randn(513, generator=generator),
        "b": torch.randn(3, 5, generator=generator) * 1e-30,
        "c": torch.zeros(4),
    }
    magnitudes = torch.cat([piece.abs().flatten() for piece in pieces.values()]).sort(descending=True).values
    assert magnitude_threshold(pieces.get, [*pieces], density) == magnitudes[max(round(density * 532), 1) - 1].item()


def test_threshold_refuses_a_density_above_one():
    with pytest.raises(ValueError, match=r"density 1\.5"):
        magnitude_threshold({"w": torch.ones(3)}.get, ["w"], 1.5)


class Watched:
    """Vectors that count how many of the tensors they handed out are alive at once."""

    def __init__(self, vectors):
        self.tasks, self.names, self._vectors = vectors.tasks, vectors.names, vectors
        self.alive = self.peak = 0

    def read(self, task, name):
        tensor = self._vectors.read(task, name).clone()
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._died)
        return tensor

    def _died(self):
        self.alive -= 1


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_number_of_tasks(method):
    peaks = []
    for tasks in (3, 12):
        watched = Watched(random_vectors(tasks))
        result = METHODS[method](watched)
        result.vector(watched.tasks[0], "w")
        peaks.append((watched.peak, watched.alive))
    assert peaks[0] == peaks[1]
    assert peaks[1][0] <= 2
    assert peaks[1][1] == 0
