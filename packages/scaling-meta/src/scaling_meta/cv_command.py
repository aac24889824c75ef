"""The command `scaling-meta cv`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import UserError
from scaling_meta.fit_command import as_text
from scaling_meta.task_command import TaskCommand


@dataclass(frozen=True, kw_only=True)
class Cv(TaskCommand):
    """Compare models by their errors on models held out: at random, by family, by date of release, the largest.

    Random folds reward recognising a family; choose by the errors on unseen families, or for larger models by those in extrapolation.
    """

    tasks: tuple[str, ...] = ()
    """Benchmarks; all by default."""
    models: tuple[str, ...] = ("median", "log-linear", "power-law", "sigmoid", "boosted", "trend", "extra-trees")
    """Regressors, of these or lightgbm."""
    splits: tuple[str, ...] = ("random", "family", "release", "largest", "compute")
    """What is held out: random, published (random, and a fifth of each training set lost), family, release, largest or compute."""
    seeds: int = 3
    """Shufflings of the random folds."""
    out: Path | None = None
    """Folder for cv.json and a file per task; an interrupted run goes on with the same command."""

    def run(self) -> dict[str, Any]:
        """Cross-validate and return one row per task, split and model."""
        from lmcore.record import Run, write_json
        from scaling_meta.regressors import regressor
        from scaling_meta.splits import SPLITS
        from scaling_meta.tasks import task_names

        tasks = task_names(self.tasks)
        for name in self.models:
            regressor(name)
        for name in self.splits:
            if name not in SPLITS:
                raise UserError(f"there is no split {name}: choose among {', '.join(SPLITS)}")
        if self.seeds < 1:
            raise UserError("--seeds is at least 1")
        if self.out is not None:
            Run(self.out, self._config(tasks))
        result = {"rows": [row for task in tasks for row in self._kept(task)]}
        if self.out is not None:
            write_json(self.out / "cv.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the errors: a line per task and model, a column per split."""
        from lmcore.cli import print_table

        cells = {(row["task"], row["model"], row["split"]): row for row in result["rows"]}
        lines = []
        for task, model in dict.fromkeys((task, model) for task, model, _ in cells):
            line = {"task": task, "model": model}
            for split in self.splits:
                row = cells[task, model, split]
                low, high, _ = row["mae_interval"]
                line[split] = f"{as_text(row['mae'])} ({low:.3f} to {high:.3f})"
            lines.append(line)
        print("mean absolute error (95 %, families resampled)\n")
        print_table(lines)

    def _config(self, tasks: tuple[str, ...]) -> dict[str, Any]:
        names = ("features", "models", "splits", "seeds", "seed")
        return {name: getattr(self, name) for name in names} | {"tasks": tasks, "database": str(self.database or "shipped")}

    def _kept(self, task: str) -> list[dict[str, Any]]:
        """The rows of a task: what an earlier run has made, or make them."""
        from lmcore.record import write_json

        path = None if self.out is None else self.out / f"{task}.json"
        if path is not None and path.exists():
            return list(json.loads(path.read_bytes()))
        rows = self._rows(task)
        if path is not None:
            write_json(path, rows)
        return rows

    def _rows(self, task: str) -> list[dict[str, Any]]:
        from tqdm import tqdm

        from scaling_meta.crossval import cross_validate
        from scaling_meta.regressors import regressor
        from scaling_meta.schema import BENCHMARKS
        from scaling_meta.splits import SPLITS
        from scaling_meta.tasks import plain

        table, y, stderr = self.load(task)
        seeds, rows = range(self.seed, self.seed + self.seeds), []
        divided = {split: SPLITS[split](table, seeds) for split in self.splits}
        with tqdm(total=len(divided) * len(self.models), desc=task, leave=False, disable=None) as bar:
            for split, splits in divided.items():
                for name in self.models:
                    found = cross_validate(table, y, regressor(name, BENCHMARKS[task]), splits)
                    interval = list(found.interval("mae", seed=self.seed).interval)
                    tested = sum(len(one.test) for one in splits)
                    row = {"task": task, "split": split, "model": name, "tested": tested}
                    rows.append(row | plain(found.metrics(stderr)) | {"mae_interval": interval})
                    bar.update()
        return rows
