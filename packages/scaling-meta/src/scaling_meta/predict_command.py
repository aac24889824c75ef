"""The command `scaling-meta predict`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError

if TYPE_CHECKING:
    from scaling_meta.saved_model import SavedModel
    from scaling_meta.table import Table


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """Predict the scores of a model from its design, before it is evaluated, or trained.

    Reads config.json and the headers of the weights; tokens and the composition of the data are in neither: --set gives them. A benchmark
    whose models are too unlike this one gets no prediction but the reason. If none gets one, the command ends with status 2.
    """

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    set: list[str] = field(default_factory=list)
    """FIELD=VALUE, e.g. --set tokens_billions=2000 share_code=8; in place of what the folder says, too."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks; all 13 by default."""
    fit: list[Path] = field(default_factory=list)
    """Folders that scaling-meta fit wrote, one for each benchmark, in place of --tasks, --regressor and --database."""
    regressor: str = "trend"
    """What predicts: trend, boosted, log-linear, ... The trend is better on families and sizes that it has not seen."""
    level: float = 0.9
    """Level of the intervals."""
    database: Path | None = None
    """Folder of the database; the shipped one by default."""

    def run(self) -> dict[str, Any]:
        """Predict each benchmark; return the design, the predictions with intervals, and why there is none."""
        from tqdm import tqdm

        from scaling_meta.tasks import as_fields, design_in, pairs, plain

        sources = self._sources()
        features = tuple(dict.fromkeys(name for one in sources for name in one.table.features))
        design = design_in(self.model, pairs("--set", self.set), features)
        found = [self._predict(one, design) for one in tqdm(sources, "benchmarks", disable=None)]
        if all(one["refused"] for one in found):
            raise UserError(f"no benchmark can be predicted; {found[0]['task']}: {found[0]['refused']}")
        what = {"model": design.models[0], "level": self.level, "design": as_fields(design), "tasks": found}
        result: dict[str, Any] = plain(what)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print a row for each benchmark, and the reasons of those without a prediction."""
        print_table([
            {
                "benchmark": one["task"], "predicted": f"{one['value']:.3f}", "from": f"{one['low']:.3f}", "to": f"{one['high']:.3f}",
                "nearest": f"{one['nearest'][0]['model']} ({one['nearest'][0]['distance']:.2f})",
            }
            for one in result["tasks"] if not one["refused"]
        ])  # fmt: skip
        for one in result["tasks"]:
            if one["refused"]:
                print(f"{one['task']}: no prediction: {one['refused']}")
        guarantee = next(one["guarantee"] for one in result["tasks"] if not one["refused"])
        print(f"{result['level']:.0%} intervals, {guarantee}")

    def _sources(self) -> "list[SavedModel]":
        """What is fitted for each benchmark."""
        from scaling_meta.regressors import regressor
        from scaling_meta.saved_model import SavedModel
        from scaling_meta.schema import BENCHMARKS
        from scaling_meta.tasks import open_database, read_task, task_names

        if self.fit:
            if self.tasks or self.database:
                raise UserError("--fit has its benchmarks and models: leave --tasks and --database out")
            return [SavedModel.read(folder / "model.json") for folder in self.fit]
        database, name = open_database(self.database), self.regressor
        tasks = [read_task(database, task) for task in task_names(self.tasks)]
        return [SavedModel(one.name, name, regressor(name, BENCHMARKS[one.name]), one.table, one.y) for one in tasks]

    def _predict(self, source: "SavedModel", design: "Table") -> dict[str, Any]:
        from scaling_meta.conformal import Calibrated
        from scaling_meta.schema import BENCHMARKS
        from scaling_meta.support import OutsideSupport, Support

        benchmark, support = BENCHMARKS[source.benchmark], Support.of(source.table)
        design = design.select(source.table.features)
        empty = {"task": benchmark.name, "regressor": source.name, "value": None, "low": None, "high": None, "guarantee": None}
        near = {"nearest": support.nearest(design)}
        try:
            support.check(design)
        except OutsideSupport as error:
            return {**empty, **near, "refused": str(error)}
        calibrated = Calibrated.fit(source.regressor, source.table, source.y)
        found = calibrated.predict(design, self.level).within(benchmark.low, benchmark.high)
        interval = {"value": float(found.values[0]), "low": float(found.low[0]), "high": float(found.high[0])}
        return {**empty, **near, **interval, "guarantee": calibrated.guarantee(self.level), "refused": None}
