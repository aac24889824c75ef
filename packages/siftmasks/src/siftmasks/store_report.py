"""What is in a store, in numbers and on a page."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcore.checkpoint import DTYPES
from siftmasks.config import StoreConfig
from siftmasks.snapshot import in_one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from siftmasks.snapshot import Snapshot
    from siftmasks.store import Store

Json = dict[str, Any]

_BLUE = "#0072B2"


def storage(config: StoreConfig) -> dict[str, int]:
    """Return the `weights` that tasks train, and bytes: of these weights in the base, of all ledgers once in use, and of each task.

    A task takes its bits, and under the policy "archive" its levels; headers and commitments (a few hundred bytes per tensor) are not
    counted. While a version is written, the ledgers that it changes are on the disk twice.
    """
    bits = sum(-(-math.prod(shape) // 8) for _, shape in config.tensors.values())
    levels = config.size * DTYPES[config.dtypes["levels"]] if config.policy == "archive" else 0
    return {
        "weights": config.size,
        "base_bytes": sum(DTYPES[dtype] * math.prod(shape) for dtype, shape in config.tensors.values()),
        "ledger_bytes": config.groups * config.size * sum(DTYPES[config.dtypes[part]] for part in config.parts),
        "bytes_per_task": bits + levels,
    }


def describe(store: "Store", *, overlap_tasks: int = 20, seed: int = 0) -> Json:
    """Read the whole ledger, tensor by tensor, and the masks of `overlap_tasks` tasks; return JSON values.

    - `config`, `digest`, `tasks`; `storage`: see the function of that name, and `now`: bytes on the disk by folder;
    - `tensors`: a row per tensor: `density`, the mean share of its weights that a task moves (sum C / (T size)); `unused`, the share that
      no task moves; `mean_step`, the mean magnitude of those moves in weight units (q sum N / sum C); None in a store without tasks;
    - `occupancy`: number of weights that 0, 1, ..., T tasks move (a histogram of C); `density`: over all tensors;
    - `overlap`: between pairs of tasks: in mode "sift" the weights that both move over those that either does (Jaccard), in mode "signs"
      the share with equal signs; `expected`: if they chose independently, each with its own density per tensor.
    """
    snapshot = store.snapshot()
    config, tasks = snapshot.config, snapshot.tasks
    occupancy = np.zeros(len(tasks) + 1, np.int64)
    rows = []
    for name in sorted(config.tensors):
        count = snapshot.ledger("count", name).numpy().reshape(-1)
        total = int(snapshot.ledger("total", name).numpy().sum(dtype=np.uint64))
        used = np.bincount(count, minlength=len(occupancy))
        occupancy += used
        moves = int(count.sum(dtype=np.uint64))
        rows.append(
            {
                "name": name,
                "weights": count.size,
                "density": moves / (len(tasks) * count.size) if tasks and count.size else None,
                "unused": int(used[0]) / count.size if count.size else None,
                "mean_step": config.settings.grid.step * total / moves if moves else None,
            }
        )
    moved = int((occupancy * np.arange(len(occupancy))).sum())
    chosen = sorted(random.Random(seed).sample(tasks, min(overlap_tasks, len(tasks))))
    return {
        "store": store.path.name,
        "digest": snapshot.manifest.digest,
        "tasks": tasks,
        "config": {key: value for key, value in json.loads(config.to_bytes()).items() if key != "tensors"},
        "storage": {**storage(config), "now": _on_disk(store.path)},
        "density": moved / (len(tasks) * config.size) if tasks else None,
        "tensors": rows,
        "occupancy": occupancy.tolist(),
        "overlap": overlap(snapshot, chosen),
    }


def overlap(snapshot: "Snapshot", tasks: Sequence[str]) -> Json:
    """Compare the bits of each pair of tasks: `tasks`, `measured` (a symmetric matrix) and `expected` (see `describe`)."""
    config, several = snapshot.config, len(tasks)
    signed = config.settings.mode == "signs"
    both, either = np.zeros((several, several)), np.zeros((several, several))
    by_chance, either_by_chance = np.zeros_like(both), np.zeros_like(both)
    for name, (_, shape) in sorted(config.tensors.items()):
        bits = [snapshot.mask(task, name).numpy() for task in tasks]
        size = math.prod(shape)
        share = np.array([int(np.bitwise_count(one).sum()) / max(size, 1) for one in bits])
        meet = np.array([[int(np.bitwise_count(a & b).sum()) for b in bits] for a in bits]).reshape(both.shape)
        joint = np.outer(share, share) * size
        sums = (share[:, None] + share[None, :]) * size
        # Equal signs are those set in both and those set in neither.
        both += size - sums + 2 * meet if signed else meet
        by_chance += size - sums + 2 * joint if signed else joint
        either += size if signed else sums - meet
        either_by_chance += size if signed else sums - joint
    pairs = ~np.eye(several, dtype=bool)
    measured, expected = (
        np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
        for part, whole in ((both, either), (by_chance, either_by_chance))
    )
    return {
        "kind": "share of equal signs" if signed else "weights both move / weights either moves",
        "tasks": [*tasks],
        "measured": measured.tolist(),
        "mean": float(measured[pairs].mean()) if several > 1 else None,
        "expected": float(expected[pairs].mean()) if several > 1 else None,
    }


def write_report(path: Path, result: Json) -> None:
    """Write the page; `result` is what `describe` returned."""
    from lmcore.report import Page

    tasks, config, sizes = result["tasks"], result["config"], result["storage"]
    settings = config["settings"]
    lead = f"{len(tasks)} of at most {config['max_tasks']} tasks in one merged model, each with its own mask."
    page = Page(f"Store {result['store']}", lead)
    page.text(f"Digest {result['digest']}: a function of configuration, base model and these tasks alone.")
    page.section("Storage")
    rows = [{"folder": folder, "bytes": f"{size:,}"} for folder, size in sizes["now"].items()]
    page.table(
        [*rows, {"folder": "in all", "bytes": f"{sum(sizes['now'].values()):,}"}], "On the disk now, besides the base model."
    )
    each, most = sizes["bytes_per_task"], config["max_tasks"]
    page.text(
        f"Each further task takes {each:,} bytes, {each / max(sizes['base_bytes'], 1):.3f} of its trained weights in the base. With "
        f"{most} tasks, ledger and tasks take {sizes['ledger_bytes'] + most * each:,} bytes."
    )
    if tasks:
        page.section("Ledger")
        page.figure(
            occupancy_figure(result), "How many tasks move a weight: the count C of the ledger over all trained weights."
        )
        page.section("Masks")
        page.text(f"A task moves {result['density']:.1%} of the weights on average.")
        page.figure(
            density_figure(result), "Mean share of each tensor's weights that a task moves, in the order of the tensors' names."
        )
    if len(result["overlap"]["tasks"]) > 1:
        found = result["overlap"]
        page.figure(overlap_figure(result), f"Overlap of {len(found['tasks'])} tasks: {found['kind']}.")
        page.text(f"Mean over pairs {found['mean']:.3f}; tasks that chose independently would have {found['expected']:.3f}.")
    page.section("Tensors")
    page.table(result["tensors"], "mean_step: mean magnitude of a move, in units of the weight.")
    page.section("Configuration")
    fixed = {key: value for key, value in config.items() if key not in ("settings", "dtypes")}
    shown = {**settings, **fixed, **{f"dtype of {part}": dtype for part, dtype in config["dtypes"].items()}}
    page.table([{"setting": key, "value": str(value)} for key, value in shown.items()], "Fixed when the store was made.")
    page.section("Tasks")
    page.text(", ".join(map(in_one_line, tasks)) or "None.")
    page.write(path)


def occupancy_figure(result: Json) -> "Figure":
    """A bar per value of C."""
    figure, axes = _figure(2.8)
    counts = result["occupancy"]
    axes.bar(range(len(counts)), [count / max(sum(counts), 1) for count in counts], width=1.0, color=_BLUE)
    axes.set_xlabel("tasks that move the weight")
    axes.set_ylabel("share of weights")
    return figure


def density_figure(result: Json) -> "Figure":
    """A point per tensor."""
    figure, axes = _figure(2.8)
    axes.plot([row["density"] for row in result["tensors"]], ".", color=_BLUE)
    axes.set_ylim(0, 1)
    axes.set_xlabel("tensor")
    axes.set_ylabel("density")
    return figure


def overlap_figure(result: Json) -> "Figure":
    """A square per pair of tasks."""
    tasks = [in_one_line(task) for task in result["overlap"]["tasks"]]
    side = max(2.5, 1.2 + 0.22 * len(tasks))
    figure, axes = _figure(side, width=side + 0.8)
    image = axes.imshow(result["overlap"]["measured"], vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=7, parse_math=False)
    figure.colorbar(image)
    return figure


def _figure(height: float, width: float = 7.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _on_disk(path: Path) -> dict[str, int]:
    """Bytes by folder of a store: ledger, masks, archive, sidecar; config and manifest together."""
    sizes: dict[str, int] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            parts = file.relative_to(path).parts
            folder = parts[0] if len(parts) > 1 else "config"
            sizes[folder] = sizes.get(folder, 0) + file.stat().st_size
    return sizes
