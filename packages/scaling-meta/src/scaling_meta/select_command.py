"""The command `scaling-meta select`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcore.errors import UserError
from scaling_meta.schema import SCALING
from scaling_meta.task_command import TaskCommand

if TYPE_CHECKING:
    import numpy as np

    from scaling_meta.selection import Search
    from scaling_meta.splits import Split
    from scaling_meta.table import Table

SPLITS = ("random", "family", "compute")
_SHUFFLES = 3  # into random folds


@dataclass(frozen=True, kw_only=True)
class Select(TaskCommand):
    """Choose features by greedy forward selection, and measure honestly what they gain over size and data alone.

    The selection is made anew in each training set, and judged on models it has not seen: random folds, unseen families, the fifth with the
    most compute. --as-published also runs the paper's procedure, which selects and judges on the same models, and shows it beside.
    Writes a file per task and select.json to OUT; an interrupted run goes on with the same command.
    """

    out: Path
    """Folder for the results."""
    tasks: tuple[str, ...] = ()
    """Benchmarks; all by default."""
    features: tuple[str, ...] = ("scaling", "architecture", "data", "generation")
    """log_params and log_tokens, and what to choose among: features by name, or groups (scaling, architecture, data, generation)."""
    as_published: bool = False
    """Also select as in the paper: a grid of 18 settings and 10 seeds for each candidate."""
    inner: Literal["random", "family"] = "random"
    """Whether the honest selection judges features on random folds of its training set, or on folds of whole families."""
    search_seeds: int = 5
    """Shufflings over which the honest selection averages."""
    halves: int = 20
    """Halves of the families in which to select again, to see how stable the choice is; 0 leaves this out."""

    def run(self) -> dict[str, Any]:
        """Select for each task; return the gains, with false discovery rates over the tasks."""
        from lmcore.record import Run, write_json
        from scaling_meta.tasks import task_names

        tasks = task_names(self.tasks)
        if self.search_seeds < 1 or self.halves < 0:
            raise UserError("--search-seeds is at least 1, --halves at least 0")
        names = ("features", "as_published", "inner", "search_seeds", "halves", "seed")
        config = {name: getattr(self, name) for name in names} | {"database": str(self.database or "shipped")}
        Run(self.out, config | {"tasks": tasks})
        result = {"tasks": with_discovery_rates([self._task(task) for task in tasks])}
        write_json(self.out / "select.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the gains of each task side by side, the tests, and the features that are chosen most often."""
        from lmcore.cli import print_table

        rows = []
        for one in result["tasks"]:
            row = {"task": one["task"]}
            if self.as_published:
                row |= {"as published": f"{one['published']['gain'][0]:.1%}", "p": f"{one['published']['naive_p']:.1g}"}
            for split in SPLITS:
                value, low, high, _ = one[split]["gain"]
                row |= {split: f"{value:.1%} ({low:.0%} to {high:.0%})"}
            rows.append(
                row | {"corrected p": f"{one['random']['corrected_p']:.2g}", "q by family": f"{one['family']['family_q']:.2g}"}
            )
        print("relative reduction of the error by the selected features (95 %, families resampled)\n")
        print_table(rows)
        for one in result["tasks"] if self.halves else ():
            often = [f"{name} {share:.0%}" for name, share in one["stability"].items() if share >= 0.3]
            print(f"\n{one['task']}, chosen in 30 % or more of {self.halves} halves: {', '.join(often) or 'none'}", end="")
        print()

    def _task(self, task: str) -> dict[str, Any]:
        """The result of a task; a part that an earlier run has made is read from its file."""
        from lmcore.record import write_json
        from scaling_meta.selection import Search, stability
        from scaling_meta.splits import SPLITS as MAKERS

        table, y, _ = self.load(task)
        seeds = range(self.seed, self.seed + _SHUFFLES)
        search = Search(seeds=self.search_seeds, by_family=self.inner == "family")
        parts: dict[str, Callable[[], Any]] = {
            name: partial(_honest, f"{task} {name}", table, y, MAKERS[name](table, seeds), search, self.seed) for name in SPLITS
        }
        if self.halves:
            parts["stability"] = partial(stability, table, y, search, self.halves, seed=self.seed)
        if self.as_published:
            parts["published"] = partial(_published, f"{task} published", table, y)
        found: dict[str, Any] = {"task": task, "models": len(table)}
        for part, make in parts.items():
            path = self.out / f"{task}-{part}.json"
            if not path.exists():
                write_json(path, make())
            found[part] = json.loads(path.read_bytes())
        return found


def with_discovery_rates(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each p-value, named `..._p`, its false discovery rate over the tasks, `..._q` (Benjamini and Hochberg)."""
    import numpy as np

    from scaling_meta.inference import benjamini_hochberg

    parts = [(part, name) for part in (*SPLITS, "published") for name in tasks[0].get(part, ()) if name.endswith("_p")]
    for part, name in parts:
        rates = benjamini_hochberg(np.array([one[part][name] for one in tasks]))
        for one, rate in zip(tasks, rates.tolist(), strict=True):
            one[part][name.removesuffix("p") + "q"] = rate
    return tasks


def _honest(
    label: str, table: "Table", y: "np.ndarray", splits: "Sequence[Split]", search: "Search", seed: int
) -> dict[str, Any]:
    """The gain of a selection made anew in each training set, and how often each feature was in it."""
    from tqdm import tqdm

    from scaling_meta.optimism import honest_gain
    from scaling_meta.selection import frequencies, select_nested

    with tqdm(total=len(splits), desc=label, disable=None) as bar:
        nested = select_nested(table, y, splits, search, after_each=bar.update)
    gain = honest_gain(nested, seed)
    chosen = frequencies(nested.selections, table.features)
    return {
        "before": gain.before, "after": gain.after, "gain": [gain.gain.value, *gain.gain.interval], "family_p": gain.family.p,
        "frequency": {name: share for name, share in chosen.items() if share and name not in SCALING},
    } | ({"corrected_p": gain.corrected.p} if gain.corrected else {})  # fmt: skip


def _published(label: str, table: "Table", y: "np.ndarray") -> dict[str, Any]:
    """The paper's selection and test."""
    from tqdm import tqdm

    from scaling_meta.optimism import published_gain
    from scaling_meta.selection import PUBLISHED, select

    with tqdm(desc=label, unit=" sets of features", disable=None) as bar:
        selection = select(table, y, PUBLISHED, judged=bar.update)
    gain = published_gain(table, y, selection)
    return {
        "features": list(selection.features), "steps": [asdict(step) for step in selection.steps],
        "before": gain.before, "after": gain.after, "gain": [gain.gain.value, *gain.gain.interval],
        "naive_p": gain.naive.p, "corrected_p": gain.corrected.p,
    }  # fmt: skip
