"""All that is said of one benchmark: what moves it, its curves, the answers, matched pairs, noise and the next model to evaluate."""

from typing import Any

import numpy as np

from scaling_meta.bootstrap import family_draws
from scaling_meta.database import Scores
from scaling_meta.effects import Effects, local_effects, shap_effects
from scaling_meta.matched import matched_pairs, sign_tests
from scaling_meta.next_model import next_models
from scaling_meta.noise import noise, standard_errors
from scaling_meta.questions import QUESTIONS, answer
from scaling_meta.shap import GROUPS, Attribution, Setting, explain, fit
from scaling_meta.splits import random_folds
from scaling_meta.table import Table
from scaling_meta.tasks import Task


def explained_task(
    task: Task, candidates: Table | None = None, *, draws: int = 200, level: float = 0.95, seed: int = 0,
    setting: Setting = (3, 0.1, 100), count: int = 5,
) -> tuple[dict[str, Any], Attribution]:  # fmt: skip
    """What `scaling-meta explain` returns of a benchmark, and the SHAP values of held-out models (the paper's 3 random folds).

    "held_out" and "in_sample" are of SHAP values, "local" of accumulated local effects. `candidates` are the models of which `count` are
    named to evaluate next; by default those without a score.
    """
    table, drawn = task.table, family_draws(task.table.families, draws, seed)
    held_out = explain(table, task.y, drawn, splits=random_folds(len(table), seeds=(seed,)), setting=setting)
    attributions = {"held_out": held_out, "in_sample": explain(table, task.y, drawn, setting=setting)}
    forests = fit(table, task.y, drawn, setting)

    def effects(feature: str) -> dict[str, Effects]:
        found = {how: shap_effects(one, feature) for how, one in attributions.items()}
        if feature not in table.categories and not np.isnan(table.column(feature)).all():
            found["local"] = local_effects(table, forests, drawn, feature)
        return found

    groups = {group: [name for name in names if name in table.features] for group, names in GROUPS.items()}
    group_of = {name: group for group, names in groups.items() for name in names}
    stderr, residuals = standard_errors(task.name, task.scores), task.y - held_out.base[0] - held_out.values[0].sum(1)
    pairs, pool = matched_pairs(table, Scores(task.y, stderr)), task.unscored if candidates is None else candidates
    result = {
        "models": len(table),
        "families": len(set(table.families)),
        "importance": [
            {"feature": name, "group": group_of[name], **{how: one.importance([name], level) for how, one in attributions.items()}}
            for name in table.features
        ],
        "groups": [
            {"group": group, **{how: one.importance(names, level) for how, one in attributions.items()}}
            for group, names in groups.items()
            if names
        ],
        "curves": {name: {how: one.curve(level=level) for how, one in effects(name).items()} for name in table.features},
        "questions": [
            {
                "question": one.name, "text": one.text, "expected": one.expected[task.name],
                **{how: answer(task.name, some, one, level) for how, some in effects(one.feature).items()},
            }
            for one in QUESTIONS if task.name in one.expected
        ],
        "matched": {"pairs": pairs, "tests": sign_tests(pairs)},
        "mae": float(np.abs(residuals).mean()),
        "noise": noise(stderr, residuals),
        "next": next_models(table, task.y, pool, count=count) if len(pool) else [],
    }  # fmt: skip
    return result, held_out
