"""The command `scaling-meta whatif`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WhatIf(Command):
    """Predict a benchmark for a model with some of its design changed, with intervals calibrated on families not seen.

    There is no answer for a design too unlike the models of the database: the command then ends with status 2, naming the nearest. A
    prediction is no promise: models with such a design scored so, which is not to say that the change made it.
    """

    model: tyro.conf.Positional[str]
    """Name of a model of the database, or folder of one of Hugging Face."""
    task: str
    """Benchmark."""
    set: list[str]
    """FIELD=VALUE of the changed design, e.g. --set share_code=20 tokens_billions=2000."""
    taking_from: Annotated[list[str], tyro.conf.arg(name="from")] = field(default_factory=list)
    """Shares that give what the changed ones take, or get what they leave, e.g. --from share_web."""
    given: list[str] = field(default_factory=list)
    """FIELD=VALUE of the present design that config.json does not have, e.g. --given tokens_billions=2000 share_code=8 share_web=80."""
    regressor: str = "boosted"
    """What predicts: boosted, trend, log-linear, ..."""
    level: float = 0.9
    """Level of the intervals."""
    database: Path | None = None
    """Folder of the database; the shipped one by default."""

    def run(self) -> dict[str, Any]:
        """Predict before and after; return both, the change, and what the intervals promise."""
        from scaling_meta.conformal import Calibrated
        from scaling_meta.regressors import regressor
        from scaling_meta.schema import BENCHMARKS
        from scaling_meta.tasks import as_fields, design_in, model_in, open_database, pairs, plain, read_task, task_names
        from scaling_meta.whatif import changed, feature_of, what_if

        (name,) = task_names([self.task])
        values, given = pairs("--set", self.set), pairs("--given", self.given)
        if not values:
            raise UserError("--set is empty: say what changes, e.g. --set share_code=20")
        database, folder = open_database(self.database), Path(self.model).is_dir()
        if given and not folder:
            raise UserError("--given is for a model folder: the design of a model of the database is known as far as it is")
        before = design_in(Path(self.model), given) if folder else model_in(database, self.model)
        after = changed(before, values, self.taking_from)
        task, benchmark = read_task(database, name), BENCHMARKS[name]
        calibrated = Calibrated.fit(regressor(self.regressor, benchmark), task.table, task.y)
        bounds = benchmark.low, benchmark.high
        answer = what_if(calibrated, before, after, [feature_of(field) for field in values], level=self.level, bounds=bounds)
        old, new = as_fields(before), as_fields(after)
        measured = dict(zip(task.table.models, task.y.tolist(), strict=True)).get(before.models[0])
        return plain({
            "model": before.models[0], "task": name, "better": benchmark.better, "regressor": self.regressor, "level": self.level,
            "guarantee": calibrated.guarantee(self.level), "measured": measured,
            "changed": {field: [old[field], value] for field, value in new.items() if value != old[field]},
            "before": _interval(answer.before), "after": _interval(answer.after), "change": _interval(answer.change),
            "nearest": answer.nearest,
        })  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Print the three predictions, the measured score and the nearest models."""
        print(f"{result['model']} on {result['task']} ({result['better']} is better), {result['regressor']}")
        for name, (before, after) in result["changed"].items():
            print(f"{name}: {'unknown' if before is None else before} -> {after}")
        rows = [(what, result[what]) for what in ("before", "after", "change")]
        print_table([
            {"": what, "predicted": f"{one['value']:.4f}", "from": f"{one['low']:.4f}", "to": f"{one['high']:.4f}"} for what, one in rows
        ])  # fmt: skip
        if result["measured"] is not None:
            print(f"measured before: {result['measured']:.4f}")
        print(f"{result['level']:.0%} intervals, {result['guarantee']}")
        print("nearest: " + ", ".join(f"{one['model']} ({one['distance']:.2f})" for one in result["nearest"]))


def _interval(found: Any) -> dict[str, float]:
    return {"value": float(found.values[0]), "low": float(found.low[0]), "high": float(found.high[0])}
