"""WiSE-FT while training: every saved checkpoint also appears interpolated with an early one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lmcore.checkpoint import Checkpoint
from lmcore.record import published
from wiseft.merging import Source, merge
from wiseft.plan import check_delta


class WiseCallback(TrainerCallback):
    """Write `delta * early + (1 - delta) * checkpoint` for every checkpoint that the Trainer saves.

    `early` is a folder, file or Hub id; without it, the first checkpoint of the run is EARLY: its files are linked into
    `output_dir/wise-early`, so that `save_total_limit` may delete the checkpoint itself. The result of `checkpoint-N` is
    `output_dir/wise-N`, a complete model folder; one that exists already (a resumed run) is left alone. `evaluate(folder)` is called
    with each, and what it returns goes to `output_dir/wise.jsonl` and into the Trainer's log history as `wise_<name>`.

    The work happens on disk, on one process, after the Trainer has saved: it does not touch the model, needs no memory to speak of and
    works with DDP and FSDP alike, as long as the saved checkpoints are safetensors folders (FSDP: full state dicts).

    >>> callback = WiseCallback(delta=0.5)  # Trainer(..., callbacks=[callback])

    Source: Dang et al. 2025 (arXiv 2504.10478), section on WiSE-FT along training.
    """

    def __init__(
        self,
        early: Source | None = None,
        *,
        delta: float = 0.5,
        evaluate: Callable[[Path], dict[str, float]] | None = None,
    ):
        self.early = early
        self.delta = check_delta(delta)
        self.evaluate = evaluate

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Merge the checkpoint that was just saved (the Trainer calls this on every process; the first one works)."""
        if not state.is_world_process_zero or args.output_dir is None:
            return
        folder = Path(args.output_dir)
        saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        early = self.early
        if early is None:
            early = folder / "wise-early"
            if not early.exists():
                _keep(saved, early)
                return
        out = folder / f"wise-{state.global_step}"
        if not out.exists():
            merge(early, saved, out, delta=self.delta)
        log = folder / "wise.jsonl"
        evaluated = [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
        if self.evaluate is not None and state.global_step not in evaluated:
            metrics = {f"wise_{name}": value for name, value in self.evaluate(out).items()}
            line = {"step": state.global_step, "delta": self.delta, **metrics}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            state.log_history.append(line)


def _keep(saved: Path, place: Path) -> None:
    """Link the weights (copy them where links are not possible) and copy the model's own files."""
    with Checkpoint.open(saved) as checkpoint, published(place) as folder:
        weights = {info.file for info in checkpoint.tensors.values()}
        for path in [*sorted(weights), *saved.glob("*.json"), *saved.glob("*.jinja")]:
            if path.name == "trainer_state.json":
                continue
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
