"""The command `siftmasks evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from lmcore.cli import print_table
from lmcore.errors import UserError
from siftmasks.store_commands import ModelCommand

if TYPE_CHECKING:
    from siftmasks.examples import Example
    from siftmasks.models import Trainee
    from siftmasks.served import Scale
    from siftmasks.store import Store

Metric = Literal["accuracy", "answer_probability", "loss"]


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelCommand):
    """Score what the store serves on data of tasks, beside the maskless model and the base.

    A task of the store is served with its mask; one that is not in it, never learned or forgotten, without (held in and held out, as in
    Fig. 8 of the paper). Intervals are Student t over tasks.
    """

    data: Path
    """Folder of TASK.jsonl files, or one JSONL file with the key "task" in every line."""
    tasks: tuple[str, ...] = ()
    """Tasks to score; by default all that there are data of."""
    scale: tuple[Literal["mean", "count", "density"], ...] = ("mean",)
    """Scales to serve with: mean is the paper's."""
    labels: tuple[str, ...] = ()
    """Accuracy of choosing among these labels, for data of text and label; by default, of every token of the answer being the likeliest."""
    batch_size: int = 32
    """Examples to score at a time."""
    metric: Metric = "accuracy"
    """What the table shows; --json has all."""

    def run(self) -> dict[str, Any]:
        """Score, and return a row per task and the means."""
        from siftmasks.task_data import open_data

        store = self.opened()
        data = open_data(self.data, self.tasks[0] if len(self.tasks) == 1 else None)
        examples = data.read(self.tasks or data.tasks)
        labels = labels_of(examples, self.labels) if self.labels else None
        rows = scores(store, self.trainee(store), examples, self.scale, labels=labels, batch_size=self.batch_size)
        return {"digest": store.digest(), "tasks": rows, "means": means(rows, self.scale)}

    def show(self, result: dict[str, Any]) -> None:
        """Print a row per task, then the means."""
        from siftmasks.snapshot import in_one_line

        for row in result["tasks"]:
            row["served"] = row["served"] or {}
        columns = [(kind, scale) for scale in self.scale for kind in ("maskless", "served")]
        print_table(
            [
                {"task": in_one_line(row["task"]), "examples": str(row["examples"]), "base": f"{row['base'][self.metric]:.4f}"}
                | {f"{kind}/{scale}": _shown(row[kind].get(scale), self.metric) for kind, scale in columns}
                for row in result["tasks"]
            ]
        )
        print()
        print_table(
            [
                {
                    f"mean {self.metric}": row["model"], "scale": row["scale"] or "", "over": row["over"], "tasks": str(row["tasks"]),
                    "value": f"{row[self.metric]['value']:.4f}",
                    "95% interval": "[{:.4f}, {:.4f}]".format(*row[self.metric]["interval"]) if row["tasks"] > 1 else "-",
                }
                for row in result["means"]
            ]
        )  # fmt: skip


def labels_of(examples: "Mapping[str, Sequence[Example]]", named: Sequence[str]) -> Sequence[str | int]:
    """Return the labels to choose among, as the data have theirs: numbers, where those of the data are numbers.

    Raises: `UserError` if examples have no label, or one that is not named.
    """
    known: dict[str, str | int] = {}
    for task, own in examples.items():
        for example in own:
            if "label" not in example.fields:
                has = " and ".join(example.fields)
                raise UserError(f"--labels is for data of text and label; those of task {task!r} have {has}: leave it out")
            label = example.fields["label"]
            if str(label) not in named:
                raise UserError(
                    f"task {task!r}, example {example.id!r}: its label {label!r} is not among --labels {' '.join(named)}"
                )
            known[str(label)] = label
    numbers = all(isinstance(label, int) for label in known.values())
    return [known.get(name, int(name) if numbers and name.isdecimal() else name) for name in dict.fromkeys(named)]


def scores(
    store: "Store", trainee: "Trainee", examples: "Mapping[str, Sequence[Example]]", scales: "Sequence[Scale]",
    *, labels: Sequence[str | int] | None = None, batch_size: int = 32,
) -> list[dict[str, Any]]:  # fmt: skip
    """Score each task's examples (see `evaluation.score`) under the base, the maskless model and, if it is in the store, its own.

    Returns a row per task: `task`, `examples`, `in_store`, `base` (the scores), `maskless` and `served` (scale -> the scores; None for a
    task that is not in the store).
    """
    from siftmasks.evaluation import score
    from siftmasks.serving import Server

    def scored(task: str) -> dict[str, float]:
        return score(trainee, examples[task], labels=labels, batch_size=batch_size)

    inside = {*store.tasks}
    base = {task: scored(task) for task in examples}
    maskless: dict[str, dict[str, Any]] = {task: {} for task in examples}
    served: dict[str, dict[str, Any]] = {task: {} for task in examples if task in inside}
    for scale in scales:
        with Server(store, trainee.model, scale=scale) as server:
            server.switch(None)
            for task in examples:
                maskless[task][scale] = scored(task)
            for task, own in served.items():
                server.switch(task)
                own[scale] = scored(task)
    return [
        {"task": task, "examples": len(some), "in_store": task in inside, "base": base[task], "maskless": maskless[task]}
        | {"served": served.get(task)}
        for task, some in examples.items()
    ]


def means(rows: Sequence[Mapping[str, Any]], scales: Sequence[str]) -> list[dict[str, Any]]:
    """Return the mean over tasks of each metric with its interval.

    Of the base; and per scale of the maskless model, of the tasks in the store as they are served ("held in"), and of all tasks, where
    those that are not in the store get no mask ("held out").
    """
    held_in = [row for row in rows if row["in_store"]]
    found = [_mean("base", None, "all", [row["base"] for row in rows])]
    for scale in scales:
        found.append(_mean("maskless", scale, "all", [row["maskless"][scale] for row in rows]))
        if held_in:
            found.append(_mean("served", scale, "held in", [row["served"][scale] for row in held_in]))
            everyone = [(row["served"] or row["maskless"])[scale] for row in rows]
            found.append(_mean("served", scale, "held out", everyone))
    return found


def _mean(model: str, scale: str | None, over: str, some: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    from lmcore.claims import seed_interval

    row: dict[str, Any] = {"model": model, "scale": scale, "over": over, "tasks": len(some)}
    for metric in some[0]:
        values = [one[metric] for one in some]
        interval = seed_interval(values) if len(values) > 1 else None
        row[metric] = {"value": fmean(values), "interval": interval}
    return row


def _shown(scores: Mapping[str, float] | None, metric: str) -> str:
    return f"{scores[metric]:.4f}" if scores else "-"
