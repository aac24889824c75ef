"""Tasks of one model: how to fine-tune them, alone or together, and how to score what they are served."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain

import numba
import torch
from torch import Tensor, nn

from siftmasks import baselines
from siftmasks.baselines import Served, VectorsInMemory
from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.sift import train

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What the baselines leave open. Scales are of the average over tasks, not of the sum.

    The defaults are the best of a few that were tried on the digits (60 tasks, seed 100; TIES, TALL-masks and Consensus also 101 and 102),
    judged by the accuracy that is reported: a choice that SIFT-Masks, EMR, BitDelta and mask-only have no need of. The paper's grid for
    the scale of TALL-masks ends at 1.6, which was worse.
    """

    task_arithmetic: float = 2.0
    ties_density: float = 0.2
    dare_drop: float = 0.5
    dare: float = 2.0
    breadcrumbs: float = 4.0
    tall_density: float = 0.5
    tall: float = 2.0
    consensus: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Tasks of one model, and how they are trained and scored.

    `model` holds the base weights, `train` and `test` the examples by task (ids unique over all tasks), `loss` is that of `sift` and
    `accuracy` the share of examples that the model, as it then is, gets right. Where tasks are trained together, they get as many epochs
    as a task alone has steps, in batches of `central_batch` examples: all of them at `central_rate`, `shards` many clusters at the rate of
    the tasks.
    """

    model: nn.Module
    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    loss: Callable[[nn.Module, list[Example]], Tensor]
    accuracy: Callable[[nn.Module, Sequence[Example]], float]
    settings: SiftSettings
    trainable: Sequence[str]
    central_rate: float
    central_batch: int
    shards: Sequence[int] = ()
    knobs: Knobs = field(default_factory=Knobs)


def fine_tune(setting: Setting, examples: Sequence[Example], task: str, settings: SiftSettings) -> Tensors:
    """Train from the base model; return the float32 task vector, which is what `sift` with these settings rounds to its grid."""
    return train(setting.model, examples, settings, task=task, loss=setting.loss, trainable=setting.trainable)


def central(setting: Setting, tasks: Collection[str]) -> baselines.Merged:
    """One model, fine-tuned on the examples of all `tasks` together."""
    return baselines.Merged(_fine_tune_together(setting, tasks, "central", setting.central_rate))


def shards(setting: Setting, tasks: Sequence[str], count: int) -> Served:
    """Random clusters, each with a model fine-tuned on its tasks together (SISA without the ensemble, as Kuo et al. 2025 run it).

    The cluster of a task is a hash of its id, so that no deletion moves another task. A user without a task gets the base model.
    """
    members: dict[int, list[str]] = {}
    for task in tasks:
        members.setdefault(int.from_bytes(blake2b(task.encode(), digest_size=8).digest()) % count, []).append(task)
    rate = setting.settings.learning_rate
    trained = {shard: _fine_tune_together(setting, members[shard], f"shard {shard}", rate) for shard in members}
    return baselines.local(VectorsInMemory({task: trained[shard] for shard in members for task in members[shard]}))


def _fine_tune_together(setting: Setting, tasks: Collection[str], name: str, rate: float) -> Tensors:
    examples = [*chain.from_iterable(setting.train[task] for task in tasks)]
    batch, epochs = setting.central_batch, setting.settings.steps
    steps = epochs * -(-len(examples) // batch)
    settings = replace(setting.settings, mode="signs", learning_rate=rate, batch_size=batch, steps=steps)
    return fine_tune(setting, examples, name, settings)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch and of the kernels for the block: models this small gain nothing from more, and seeds can run side by side."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


@torch.no_grad()
def accuracy(setting: Setting, served: Served, tasks: Sequence[str], *, maskless: Collection[str] = ()) -> float:
    """Mean over `tasks` of the accuracy of what they are served; those in `maskless` get what a user without a task does."""
    parameters = dict(setting.model.named_parameters())
    base = {name: parameters[name].clone() for name in setting.trainable}
    setting.model.eval()
    total = 0.0
    try:
        for task in tasks:
            for name in base:
                parameters[name].copy_(base[name] + served.vector(None if task in maskless else task, name))
            total += setting.accuracy(setting.model, setting.test[task])
    finally:
        for name in base:
            parameters[name].copy_(base[name])
    return total / len(tasks)
