"""The command `scaling-meta fit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_meta.task_command import TaskCommand


@dataclass(frozen=True, kw_only=True)
class Fit(TaskCommand):
    """Fit a model to the scores on one benchmark, and measure it on families that it has not seen.

    Writes OUT/model.json, which scaling-meta predict reads.
    """

    task: str
    """The benchmark, e.g. arc_challenge."""
    out: Path
    """Folder for model.json."""
    model: str = "boosted"
    """median, log-linear, power-law, sigmoid, boosted, trend, extra-trees or lightgbm."""
    overwrite: bool = False
    """Replace what an earlier fit wrote there."""

    def run(self) -> dict[str, Any]:
        """Fit, write and return the errors."""
        import numpy as np

        from lmcore.record import published
        from scaling_meta.crossval import cross_validate
        from scaling_meta.metrics import METRICS
        from scaling_meta.regressors import regressor
        from scaling_meta.saved_model import SavedModel
        from scaling_meta.schema import BENCHMARKS
        from scaling_meta.splits import family_folds
        from scaling_meta.tasks import plain

        table, y, stderr = self.load(self.task)
        saved = SavedModel(self.task, self.model, regressor(self.model, BENCHMARKS[self.task]), table, y)
        unseen = cross_validate(table, y, saved.regressor, family_folds(table.families))
        known = saved.fit().predict(table)
        training = {name: METRICS[name](y, known) for name in METRICS}
        error = unseen.interval("mae", seed=self.seed)
        with published(self.out, overwrite=self.overwrite) as folder:
            saved.write(folder / "model.json")
        return {
            "task": self.task, "model": self.model, "models": len(table), "families": len(np.unique(table.families)),
            "features": list(table.features), "written": str(self.out / "model.json"), "mae_interval": list(error.interval),
            "unseen_families": plain(unseen.metrics(stderr)), "training": plain(training),
        }  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Print the errors on unseen families beside those on the training models."""
        from lmcore.cli import print_table

        print(f"{result['model']} for {result['task']}: {result['models']} models of {result['families']} families\n")
        metrics = result["unseen_families"]
        rows = {"unseen families": metrics, "training": {name: result["training"].get(name) for name in metrics}}
        print_table([{"on": on} | {name: as_text(value) for name, value in values.items()} for on, values in rows.items()])
        low, high, level = result["mae_interval"]
        print(
            f"\nmae on unseen families: {low:.4f} to {high:.4f} ({level:.0%}, families resampled)\nwritten: {result['written']}"
        )


def as_text(value: float | None) -> str:
    """Four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"
