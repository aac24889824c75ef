"""The command `scaling-meta explain`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcore.cli import Command, print_table
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Explain(Command):
    """Say which design choices go with the scores of benchmarks, and how much stands behind each answer.

    Exact SHAP values of boosted trees, of held-out models (the test folds of 3 random folds, as in the paper) and in-sample; curves of each
    feature (SHAP and accumulated local effects) with the models and families in each range; matched pairs of siblings; evaluation noise;
    and which model to evaluate next. Intervals are over resampled families, the trees refitted to each draw.
    """

    task: list[str] = field(default_factory=list)
    """Benchmarks, such as lambada humaneval; all 13 by default."""
    out: Path | None = None
    """Folder for explain.json, importance.csv, curves.csv, pairs.csv and a figure of each benchmark."""
    database: Path | None = None
    """Folder of the database; the shipped one by default."""
    draws: int = 200
    """Bootstrap draws of families."""
    level: float = 0.95
    """Level of the intervals."""
    depth: int = 3
    """Depth of the trees."""
    learning_rate: float = 0.1
    """Learning rate of the trees."""
    trees: int = 100
    """Number of trees."""
    candidates: Path | None = None
    """Models that could be evaluated next, as a CSV with a row each; by default those of the database without a score."""
    count: int = 5
    """How many of them to name."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> dict[str, Any]:
        """Explain each benchmark; return importance, curves, answers, pairs, noise and next models, and how alike benchmarks are."""
        from tqdm import tqdm

        from scaling_meta.explain_files import write
        from scaling_meta.explaining import explained_task
        from scaling_meta.importers import load
        from scaling_meta.shap import Attribution, task_similarity
        from scaling_meta.tasks import open_database, plain, read_task, task_names

        if self.draws < 20 or not 0 < self.level < 1 or min(self.depth, self.trees, self.count) < 1 or self.learning_rate <= 0:
            raise UserError("--draws is at least 20, --level between 0 and 1, --depth, --trees and --count at least 1")
        if self.out is not None and self.out.exists() and not self.overwrite:
            raise UserError(f"{self.out} exists: pass --overwrite or choose another --out")
        database, setting, explained = open_database(self.database), (self.depth, self.learning_rate, self.trees), {}
        candidates = load(self.candidates).database.table() if self.candidates else None
        attributions: dict[str, Attribution] = {}
        for name in tqdm(task_names(self.task), "benchmarks", disable=None):
            explained[name], attributions[name] = explained_task(
                read_task(database, name),
                candidates,
                draws=self.draws,
                level=self.level,
                seed=self.seed,
                setting=setting,
                count=self.count,
            )
        options = {"draws": self.draws, "level": self.level, "seed": self.seed, "setting": setting}
        similarity = task_similarity(attributions) if len(attributions) > 1 else None
        result: dict[str, Any] = plain({"options": options, "tasks": explained, "similarity": similarity})
        if self.out is not None:
            write(result, self.out, overwrite=self.overwrite)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print, of each benchmark, the features that move it most, the answers, the tests of matched pairs, noise and next models."""
        from scaling_meta.explain_files import LABELS

        for name, task in result["tasks"].items():
            print(f"\n{name}: {task['models']} models of {task['families']} families; held-out mean |SHAP|")
            print_table([
                {"feature": row["feature"], "mean |SHAP|": _shown(row["held_out"])}
                for row in sorted(task["importance"], key=lambda row: -row["held_out"]["value"])[:8]
            ])  # fmt: skip
            for answer in task["questions"]:
                sides = answer["held_out"]["contrast"]
                print(
                    f"\n{answer['text']} Expected {'higher' if answer['expected'] > 0 else 'lower'}: {answer['held_out']['verdict']}"
                )
                for side in ("below", "above"):
                    one = sides[side]
                    print(
                        f"  {one['name']}: {_shown(one['effect'])}, {one['models']} models, families: {', '.join(one['families'])}"
                    )
                for how in ("held_out", "in_sample", "local"):
                    if how in answer:
                        print(f"  difference, {LABELS[how]}: {_shown(answer[how]['contrast']['difference'])}")
            if task["matched"]["tests"]:
                print("\nmatched pairs")
                print_table([
                    {
                        "change": test["change"], "pairs": str(test["pairs"]), "higher": str(test["higher"]),
                        "median": f"{test['median']:+.4f}", "p": f"{test['p']:.3f}", "families": ", ".join(test["families"]),
                    }
                    for test in task["matched"]["tests"]
                ])  # fmt: skip
            if task["noise"]:
                noise = task["noise"]
                print(
                    f"\nevaluation noise: MAE cannot be below {noise['floor']:.4f}; {noise['share']:.1%} of the squared error is noise"
                )
            for one in task["next"]:
                print(f"evaluate next: {one['model']} ({one['reduction']:.1%} less variance of prediction)")
        if self.out is not None:
            print(f"\nall of it: {self.out}")


def _shown(estimate: dict[str, Any]) -> str:
    low, high, _ = estimate["interval"]
    interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    return "none" if estimate["value"] is None else f"{estimate['value']:+.4f}{interval}"
