"""What the headline measures on one task."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_meta.boosting import Boosted
from scaling_meta.bootstrap import family_draws
from scaling_meta.crossval import CrossValidation, cross_validate
from scaling_meta.effects import SHARE_EDGES, shap_effects
from scaling_meta.inference import family_permutation, nadeau_bengio, paired_t_test, relative_gain
from scaling_meta.questions import QUESTIONS, answer
from scaling_meta.schema import SCALING
from scaling_meta.shap import explain
from scaling_meta.splits import SPLITS, random_folds
from scaling_meta.tasks import Task, plain

SETTING = (3, 0.1, 100)
"""Depth, learning rate, trees: fixed, so that no search can favour either side."""
HELD_OUT = ("random", "family", "compute")


def gains_of(task: Task, seeds: Sequence[int]) -> dict[str, Any]:
    """By split, the errors of boosted trees on size and tokens alone, and on architecture and data as well; JSON values.

    "errors" are those of each model, for `joint_gain`; "naive_p" is the paper's test, over seeds as if they were independent samples.
    """
    table, regressor, found = task.table, Boosted(grid=(SETTING,)), {}
    for name in HELD_OUT:
        splits = SPLITS[name](table, seeds)
        before, after = (cross_validate(columns, task.y, regressor, splits) for columns in (table.select(SCALING), table))
        tested = ~np.isnan(before.model_errors)
        families = [family for family, one in zip(table.families, tested, strict=True) if one]
        first, second = before.model_errors[tested], after.model_errors[tested]
        found[name] = {
            "before": float(first.mean()),
            "after": float(second.mean()),
            "gain": relative_gain(first, second, families),
            "family_p": family_permutation(first, second, families).p,
            "families": families,
            "errors": [first, second],
            **(_tests(before, after, len(seeds)) if name == "random" and len(seeds) > 1 else {}),
        }
    result: dict[str, Any] = plain(found)
    return result


def answers_of(task: Task, draws: int, seed: int) -> dict[str, Any]:
    """What SHAP values of held-out models say to the paper's questions, the curves of code and web shares, and each feature's weight."""
    table = task.table
    held_out = explain(
        table,
        task.y,
        family_draws(table.families, draws, seed),
        splits=random_folds(len(table), seeds=(seed,)),
        setting=SETTING,
    )
    result: dict[str, Any] = plain({
        "importance": {name: held_out.importance([name]) for name in table.features},
        "curves": {name: shap_effects(held_out, name).curve(SHARE_EDGES) for name in ("share_code", "share_web")},
        "questions": {
            one.name: answer(task.name, shap_effects(held_out, one.feature), one) for one in QUESTIONS if task.name in one.expected
        },
    })  # fmt: skip
    return result


def _tests(before: CrossValidation, after: CrossValidation, seeds: int) -> dict[str, float]:
    differences = before.fold_errors - after.fold_errors
    return {
        "naive_p": paired_t_test(differences.reshape(seeds, -1).mean(1)).p,
        "corrected_p": nadeau_bengio(differences, before.train, before.test).p,
    }
