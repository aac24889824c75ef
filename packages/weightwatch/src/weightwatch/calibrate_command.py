"""The command `weightwatch calibrate`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lmcore.cli import print_table
from lmcore.errors import UserError
from weightwatch.model_command import ModelCommand
from weightwatch.places import check_place


@dataclass(frozen=True, kw_only=True)
class Calibrate(ModelCommand):
    """Learn what normal inputs do along the directions: the ranges that scan and generate watch.

    Reads each conversation once, as far as the last watched block. An interrupted run goes on with the same command. Processes of
    torchrun share the conversations and write the same state.
    """

    directions: tyro.conf.Positional[Path]
    """Folder that weightwatch directions wrote."""
    data: Path
    """Normal conversations: JSON lines of messages, or of prompt with or without completion."""
    out: Path
    """Folder for the state."""
    top: int | None = None
    """Directions per matrix, at most; by default all above the noise edge."""
    below_edge: bool = False
    """Watch the directions below the noise edge too."""
    drop_last: int = 3
    """Blocks at the end of the model to leave out."""
    skip_first: int = 1
    """Tokens at the start of each input to leave out, where attention sinks."""
    max_length: int = 2048
    """Tokens after which a conversation is cut."""
    tail: int = 64
    """Largest values to keep per direction and side: alpha times about half of the inputs must not need more than a third of it."""
    overwrite: bool = False
    """Replace a finished state in OUT."""

    def run(self) -> dict[str, Any]:
        """Calibrate; return what the state holds."""
        from weightwatch.conversations import ROLES, read_conversations, tokenize
        from weightwatch.directions import Directions
        from weightwatch.model_command import positions
        from weightwatch.planning import plan
        from weightwatch.state import calibrate

        if min(self.tail, self.max_length, 1 if self.top is None else self.top) < 1:
            raise UserError("--tail, --top and --max-length are at least 1")
        if min(self.skip_first, self.drop_last) < 0:
            raise UserError("--skip-first and --drop-last are at least 0")
        if os.environ.get("RANK", "0") == "0":  # other processes of torchrun might look while it is written
            finished = (self.out / "calibration.safetensors").exists()
            inputs = [self.directions, self.data, Path(self.model)]
            check_place(self.out, inputs, self.overwrite or not finished, record="config.json")
        directions = Directions.load(self.directions)
        read = read_conversations(self.data)
        model, tokenizer = self.load()
        conversations = [*tokenize(read, tokenizer, max_length=min(self.max_length, positions(model)))]
        stack = {"k": self.top, "signal_only": not self.below_edge, "drop_last": self.drop_last}
        calibration = calibrate(
            model, directions, conversations, self.out, stack=stack, skip_first=self.skip_first, batch_tokens=self.batch_tokens,
            tail=self.tail, overwrite=self.overwrite, progress=True,
        )  # fmt: skip
        with_role = zip(ROLES, calibration.inputs_with_role.tolist(), strict=True)
        return {
            "out": str(self.out),
            "inputs": calibration.inputs,
            **{f"with {role} tokens": count for role, count in with_role},
            "directions": calibration.tail.shape[1],
            "least alpha": 1 / (calibration.scored_inputs + 1),
            "plan": plan(calibration.tail.shape[1]),
        }

    def show(self, result: dict[str, Any]) -> None:
        """Print how many inputs and directions, how low a rate of false alarms they allow, and what lower ones would take."""
        roles = ", ".join(f"{count} {name}" for name, count in result.items() if name.startswith("with "))
        print(
            f"{result['inputs']} inputs ({roles}), {result['directions']} directions: alpha down to {result['least alpha']:.2g}"
        )
        print("inputs to calibrate on for a rate of false alarms of at most alpha:")
        print_table([{name: f"{value:,}" for name, value in row.items()} for row in result["plan"]])
        print(f"wrote {result['out']}")
