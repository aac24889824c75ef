"""Tasks of a model so small that every number can be checked."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from siftmasks import baselines
from siftmasks.comparison import compare
from siftmasks.deletions import FloatSum, deletion_steps
from siftmasks.examples import Example
from siftmasks.grid import Grid
from siftmasks.ops.ledger_add import ledger_add
from siftmasks.settings import SiftSettings
from siftmasks.sift import sift
from siftmasks.task_setting import Setting, accuracy, central, fine_tune, shards


def mean_square(model, batch):
    inputs = torch.stack([example.fields["input"] for example in batch])
    return (model(inputs) - torch.stack([example.fields["target"] for example in batch])).square().mean()


def share_of_right_signs(model, examples):
    with torch.no_grad():
        right = [torch.equal(model(example.fields["input"]) > 0, example.fields["target"] > 0) for example in examples]
    return sum(right) / len(right)


@pytest.fixture
def setting():
    """Each task wants an output of a sign of its own for the same inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 6, generator=generator)
    train = {
        f"task {task}": [
            Example(f"{task}/{row}", {"input": inputs[row], "target": target})
            for row, target in enumerate(torch.randn(8, 1, generator=generator).sign())
        ]
        for task in range(6)
    }
    return Setting(
        model=model, train=train, test=train, loss=mean_square, accuracy=share_of_right_signs,
        settings=SiftSettings(learning_rate=0.02, steps=20, seed=4), trainable=[name for name, _ in model.named_parameters()],
        central_rate=0.02, central_batch=8, shards=(2,),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_float_task_vector_rounds_to_what_sift_gives(setting, mode):
    settings = replace(setting.settings, mode=mode, batch_size=3)
    examples = setting.train["task 0"]
    tuned = fine_tune(setting, examples, "task 0", settings)
    found = sift(setting.model, examples, settings, task="task 0", loss=setting.loss)
    grid = Grid.of(0.02, 20)
    for name, levels in found.levels.items():
        total, count = (torch.zeros(levels.shape, dtype=torch.uint8) for _ in range(2))
        assert torch.equal(ledger_add(tuned[name], total, count, step=grid.step, bits=8)[0], levels)


def test_scoring_gives_the_weights_back_bit_for_bit(setting):
    before = [parameter.detach().clone() for parameter in setting.model.parameters()]
    vectors = {"task 0": {name: torch.full_like(p, 0.1) for name, p in setting.model.named_parameters()}}
    served = baselines.local(baselines.VectorsInMemory(vectors))
    accuracy(setting, served, ["task 0"])
    with pytest.raises(KeyError):
        accuracy(setting, served, ["task 0", "unknown"])
    assert all(torch.equal(old, new) for old, new in zip(before, setting.model.parameters(), strict=True))


def test_one_shard_serves_all_tasks_one_model_trained_at_the_rate_of_the_tasks(setting):
    setting = replace(setting, central_batch=48)  # all examples at each step, so that their order makes no difference
    tasks = [*setting.train]
    one = shards(replace(setting, central_rate=1.0), tasks, 1)
    together = central(setting, tasks)
    for name in setting.trainable:
        assert torch.equal(one.vector("task 0", name), one.vector("task 5", name))
        torch.testing.assert_close(one.vector("task 0", name), together.vector("task 0", name), rtol=0, atol=1e-3)


def test_shard_of_a_task_does_not_depend_on_the_tasks_of_other_shards(setting):
    tasks = [*setting.train]
    both = shards(setting, tasks, 2)
    first = {task for task in tasks if torch.equal(both.vector(task, "0.bias"), both.vector(tasks[0], "0.bias"))}
    assert 0 < len(first) < len(tasks)
    alone = shards(setting, [task for task in tasks if task in first], 2)
    assert all(torch.equal(both.vector(task, "0.weight"), alone.vector(task, "0.weight")) for task in first)


def test_comparison_of_one_task_serves_it_as_trained(setting):
    found = compare(setting, counts=[1, 6], fractions=[0.0, 0.5], densities=[0.5])
    local = found["accuracy"]["local_sift"][0]
    assert local > found["accuracy"]["zero_shot"][0]
    for method in ("sift_masks", "sift_masks_count", "sift_merge"):
        assert found["accuracy"][method][0] == local
    for method in ("ft_merge", "emr", "sign_ledger"):
        assert found["accuracy"][method][0] == found["accuracy"]["local_fine_tuning"][0]
    assert {len(scores) for scores in found["accuracy"].values()} == {2}
    assert found["weights"] == 6 * 24 + 24 + 24 + 1


def test_deletion_serves_the_forgotten_what_an_unknown_user_gets_and_leaves_no_trace(setting):
    deletion = compare(setting, counts=[6], fractions=[0.0, 0.5])["deletion"]
    assert deletion["differing"] == 0
    assert {*deletion["seconds"]} == {"rederive"}
    for method, (before, after) in deletion["held_in"].items():
        assert deletion["held_out"][method][0] == before, method
        assert 0 <= after <= 1


def test_same_seed_gives_the_same_scores(setting):
    first, second = (compare(setting, counts=[3], fractions=[0.0, 0.4], densities=[0.5]) for _ in range(2))
    for part in ("accuracy", "mask_density", "float_sum"):
        assert first[part] == second[part]
    assert first["deletion"]["held_out"] == second["deletion"]["held_out"]


def test_float_sum_keeps_a_residue_where_addition_rounds_and_none_where_it_does_not():
    generator = torch.Generator().manual_seed(0)
    rounded, exact = FloatSum(forgotten="b"), FloatSum(forgotten="b")
    for task in "abcdefgh":
        vector = torch.randn(1000, generator=generator)
        rounded.add(task, {"w": vector})
        exact.add(task, {"w": (vector * 256).round() / 256})
    assert 0.05 < rounded.residue()["share_different"] < 0.9
    assert 0 < rounded.residue()["largest_difference"] < 1e-5
    assert exact.residue() == {"share_different": 0.0, "largest_difference": 0.0}


def test_steps_of_deletions_one_by_one_are_those_of_a_simulation():
    tasks, steps, count, deletions = 23, 20, 4, 17
    sizes = [len(range(shard, tasks, count)) for shard in range(count)]
    rebuild = shard_steps = 0
    for deletion in range(deletions):
        largest = max(range(count), key=lambda shard: sizes[shard])
        sizes[largest] -= 1
        shard_steps += steps * sizes[largest]
        rebuild += steps * (tasks - 1 - deletion)
    found = deletion_steps(tasks, steps, deletions=deletions, shards=count)
    assert found["shards"] == shard_steps
    assert found["rebuild"] == found["central"] == rebuild
    assert found["sift_masks"] == deletions * steps
