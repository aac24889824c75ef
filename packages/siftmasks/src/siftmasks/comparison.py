"""All methods over the same tasks: accuracy by number of tasks merged, under deletion, and what deletions cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from siftmasks import baselines
from siftmasks.baselines import Served, VectorsInMemory
from siftmasks.deletions import FloatSum, delete_most
from siftmasks.memory_ledger import MemoryLedger
from siftmasks.settings import SiftSettings
from siftmasks.sift import prune
from siftmasks.task_setting import Setting, accuracy, central, fine_tune, shards


class Learned:
    """The tasks learned so far, as every method needs them.

    `tuned` are the task vectors of plain fine-tuning, float32; `ledger` has those under the sign constraint, on the grid; `own_signs` is a
    ledger of the former in mode "signs"; `pruned` has, for each share, a ledger of the latter with that share of each tensor.
    """

    def __init__(self, setting: Setting, max_tasks: int, densities: Sequence[float] = ()):
        self.setting = setting
        self._sift, self._free = (replace(setting.settings, mode=mode) for mode in ("sift", "signs"))
        self.tuned: dict[str, dict[str, Tensor]] = {}
        self.ledger, self.own_signs = self._empty(self._sift, max_tasks), self._empty(self._free, max_tasks)
        self.pruned = {density: self._empty(self._sift, max_tasks) for density in densities}
        self.float_sum = FloatSum(forgotten=next(iter(setting.train)))
        self.seconds = 0.0

    def learn(self, task: str) -> None:
        """Fine-tune a task with and without the sign constraint and add it everywhere; `seconds` counts the fine-tuning without."""
        began = perf_counter()
        self.tuned[task] = fine_tune(self.setting, self.setting.train[task], task, self._free)
        self.seconds += perf_counter() - began
        constrained = fine_tune(self.setting, self.setting.train[task], task, self._sift)
        self.own_signs.learn(task, self.tuned[task])
        self.ledger.learn(task, constrained)
        self.float_sum.add(task, constrained)
        for density, ledger in self.pruned.items():
            ledger.learn(task, {name: prune(tensor, density) for name, tensor in constrained.items()})

    def methods(self) -> dict[str, Callable[[], Served]]:
        """Every method over the tasks learned so far, by name; calling it does the merging or training."""
        knobs, tasks, setting = self.setting.knobs, [*self.tuned], self.setting
        tuned, each = VectorsInMemory(self.tuned), 1 / len(self.tuned)
        return {
            "zero_shot": lambda: baselines.task_arithmetic(tuned, 0.0),
            "local_fine_tuning": lambda: baselines.local(tuned),
            "local_sift": lambda: baselines.local(self.ledger),
            "ft_merge": lambda: baselines.average(tuned),
            "sift_merge": lambda: baselines.average(self.ledger),
            "task_arithmetic": lambda: baselines.task_arithmetic(tuned, knobs.task_arithmetic * each),
            "ties": lambda: baselines.ties(tuned, knobs.ties_density),
            "dare": lambda: baselines.dare(tuned, knobs.dare_drop, knobs.dare * each),
            "breadcrumbs": lambda: baselines.breadcrumbs(tuned, knobs.breadcrumbs * each),
            "consensus": lambda: baselines.consensus(tuned, knobs.tall_density, scale=knobs.consensus),
            "tall_masks": lambda: baselines.tall_masks(tuned, knobs.tall_density, knobs.tall),
            "emr": lambda: baselines.emr(tuned),
            "bitdelta": lambda: baselines.bitdelta(tuned),
            "mask_only": lambda: baselines.mask_only(self.ledger),
            "sift_masks": lambda: self.ledger.served("mean"),
            "sift_masks_density": lambda: self.ledger.served("density"),
            "sift_masks_count": lambda: self.ledger.served("count"),
            "sign_ledger": lambda: self.own_signs.served("mean"),
            **{f"sift_masks_count_top_{share:g}": partial(one.served, "count") for share, one in self.pruned.items()},
            "central": lambda: central(setting, tasks),
            **{f"shards_{count}": partial(shards, setting, tasks, count) for count in setting.shards},
        }

    def _empty(self, settings: SiftSettings, max_tasks: int) -> MemoryLedger:
        parameters = dict(self.setting.model.named_parameters())
        return MemoryLedger(settings, {name: parameters[name] for name in self.setting.trainable}, max_tasks=max_tasks)


def compare(
    setting: Setting, *, counts: Sequence[int], fractions: Sequence[float] = (), densities: Sequence[float] = ()
) -> dict[str, Any]:
    """Learn `max(counts)` tasks one after another, score every method at each of `counts`, then delete up to the last of `fractions`.

    Returns JSON values:
    - `accuracy`: method -> a number per count, the mean over the tasks merged so far;
    - `mask_density` and `saturated`: the mean share of weights that a task moves, and how many coordinates lay beyond the grid;
    - `float_sum`: what one deletion leaves in a float32 running sum (see `FloatSum`);
    - `deletion`: see `delete_most`;
    - `seconds`: to learn a task without the constraint, and to merge or train each method over all tasks;
    - `seconds_per_deletion`, the first one, of all tasks: `rederive` and `archive` of SIFT-Masks; `rebuild` trains all other tasks again
      and merges them by EMR; `central` and `shards_N` train as for all tasks.
    """
    tasks = [*setting.train][: max(counts)]
    learned, scores, seconds = Learned(setting, len(tasks), densities), dict[str, list[float]](), dict[str, float]()
    for number, task in enumerate(tasks, 1):
        learned.learn(task)
        if number in counts:
            for method, make in learned.methods().items():
                began = perf_counter()
                served = make()
                seconds[method] = perf_counter() - began
                scores.setdefault(method, []).append(accuracy(setting, served, tasks[:number]))
    density, learn_one = learned.ledger.density, learned.seconds / len(tasks)
    deletion = delete_most(setting, learned.ledger, VectorsInMemory(learned.tuned), fractions)
    return {
        "counts": [*counts],
        "accuracy": scores,
        "weights": sum(learned.ledger.parts[name]["total"].numel() for name in setting.trainable),
        "mask_density": density,
        "saturated": learned.ledger.saturated,
        "float_sum": learned.float_sum.residue(),
        "deletion": deletion,
        "seconds": {"learn_one": learn_one, **seconds},
        "seconds_per_deletion": {
            **deletion["seconds"],
            "rebuild": learn_one * (len(tasks) - 1) + seconds["emr"],
            "central": seconds["central"],
            **{f"shards_{count}": seconds[f"shards_{count}"] / count for count in setting.shards},
        },
    }
