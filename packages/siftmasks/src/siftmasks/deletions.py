"""Deletion: what it leaves of accuracy, what it costs, and what a sum in floating point keeps of the deleted task."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from siftmasks import baselines
from siftmasks.baselines import Served, VectorsInMemory
from siftmasks.memory_ledger import MemoryLedger
from siftmasks.plan import Workload, compare
from siftmasks.sift import sift
from siftmasks.task_setting import Setting, accuracy, central

_DERIVED_AGAIN = 3


class FloatSum:
    """The float32 running sum of task vectors that one keeps without a grid, beside the one that never saw the task `forgotten`."""

    def __init__(self, forgotten: str):
        self.forgotten = forgotten
        self._all: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}
        self._own: Mapping[str, Tensor] = {}

    def add(self, task: str, task_vector: Mapping[str, Tensor]) -> None:
        """Add a float32 task vector."""
        if task == self.forgotten:
            self._own = task_vector
        for sums in [self._all] if task == self.forgotten else [self._all, self._others]:
            for name, tensor in task_vector.items():
                sums[name] = sums[name] + tensor if name in sums else tensor.clone()

    def residue(self) -> dict[str, float]:
        """What stays after the subtraction: the share of coordinates that differ from the other sum, and by how much at most."""
        pairs = [(self._all[name] - self._own[name], other) for name, other in self._others.items()]
        different = sum(int((left != other).sum()) for left, other in pairs)
        return {
            "share_different": different / max(sum(other.numel() for _, other in pairs), 1),
            "largest_difference": max((float((left - other).abs().max()) for left, other in pairs), default=0.0),
        }


def delete_most(setting: Setting, ledger: MemoryLedger, tuned: VectorsInMemory, fractions: Sequence[float]) -> dict[str, Any]:
    """Delete tasks one by one in a random order that the seed fixes, and score at each of `fractions` (ascending) of the tasks deleted.

    `held_in` and `held_out` (method -> a number per fraction) are the mean over the remaining tasks and over all tasks, of which the
    deleted ones are served what a user without a task is (Fig. 8 of Kuo et al. 2025). Central fine-tuning starts anew on what remains.
    The first deletions train the task again with `sift`, and compare; later ones take the levels from memory, as an archive would.
    `seconds`: the median time of a deletion of either kind. `differing`: at how many coordinates the ledger at the end is not that of the
    remaining tasks added anew.
    """
    order = random.Random(setting.settings.seed).sample(ledger.tasks, len(ledger.tasks))
    held_in, held_out = dict[str, list[float]](), dict[str, list[float]]()
    times = {"rederive": list[float](), "archive": list[float]()}
    for fraction in fractions:
        while len(order) - len(ledger.tasks) < round(fraction * len(order)):
            deleted = len(order) - len(ledger.tasks)
            kind = "rederive" if deleted < _DERIVED_AGAIN else "archive"
            began = perf_counter()
            _delete(setting, ledger, order[deleted], again=kind == "rederive")
            times[kind].append(perf_counter() - began)
        left = ledger.tasks
        remaining = VectorsInMemory({task: tuned.tensors[task] for task in left})
        methods: dict[str, Served] = {
            "sift_masks": ledger.served("mean"),
            "sift_masks_count": ledger.served("count"),
            "ft_merge": baselines.average(remaining),
            "bitdelta": baselines.bitdelta(remaining),
            "central": central(setting, left),
        }
        for name, served in methods.items():
            held_in.setdefault(name, []).append(accuracy(setting, served, left))
            held_out.setdefault(name, []).append(accuracy(setting, served, order, maskless={*order} - {*left}))
    return {
        "fractions": [*fractions],
        "held_in": held_in,
        "held_out": held_out,
        "seconds": {kind: median(some) for kind, some in times.items() if some},
        "differing": ledger.differing(),
    }


def _delete(setting: Setting, ledger: MemoryLedger, task: str, *, again: bool) -> None:
    levels = ledger.levels[task]
    if again:
        settings = replace(setting.settings, mode="sift")
        levels = sift(
            setting.model, setting.train[task], settings, task=task, loss=setting.loss, trainable=setting.trainable
        ).levels
    ledger.forget(task, levels)


def deletion_steps(tasks: int, steps: int, *, deletions: int, shards: int = 20) -> dict[str, int]:
    """Optimizer steps of `deletions` deletions one by one, of `tasks` tasks that each take `steps` steps (Fig. 9), as in `plan.compare`.

    `sift_masks` also stands for FT + Merge, `bitdelta` for mask-only and local models, `rebuild` for TIES, TALL-masks, EMR and Consensus,
    whose masks or signs depend on all tasks, and whose local models are not stored.

    >>> deletion_steps(500, 20, deletions=499)["rebuild"] / deletion_steps(500, 20, deletions=499)["sift_masks"]
    250.0
    """
    load = Workload(weights=1, tasks=tasks, deletions=deletions, steps=steps, shards=shards, lora_weights=1)
    counted = {method.name: method.steps_per_month for method in compare(load)}
    return {
        "sift_masks": counted["SIFT-Masks, rederive"],
        "sift_masks_archive": counted["SIFT-Masks, archive"],
        "bitdelta": counted["BitDelta"],
        "rebuild": counted["TALL-masks, EMR"],
        "central": counted["central fine-tuning"],
        "shards": counted["SISA"],
    }
