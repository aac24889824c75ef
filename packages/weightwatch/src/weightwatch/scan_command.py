"""The command `weightwatch scan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmcore.cli import print_table
from lmcore.errors import UserError
from weightwatch.model_command import ModelCommand
from weightwatch.places import check_apart


@dataclass(frozen=True, kw_only=True)
class Scan(ModelCommand):
    """Say which conversations leave the calibrated ranges, at which token and along which directions; and whether inputs have drifted.

    Reads each conversation once, as far as the last watched block; generates nothing. An interrupted run with --out goes on with the same
    command.
    """

    state: tyro.conf.Positional[Path]
    """Folder that weightwatch calibrate wrote."""
    data: Path
    """Conversations: JSON lines of messages, or of prompt with or without completion."""
    rule: Literal["conformal", "minmax", "percentile"] = "conformal"
    """How ranges are set: conformal at a rate of false alarms; minmax as in the paper; percentile per direction and side."""
    level: Annotated[float, tyro.conf.arg(aliases=["--alpha"])] = 0.01
    """Rate of false alarms for conformal, epsilon for minmax, share of inputs left out on each side for percentile."""
    max_length: int = 2048
    """Tokens after which a conversation is cut."""
    events: int = 5
    """Directions to name per flagged conversation, those furthest out first."""
    out: Path | None = None
    """File for the verdicts, one JSON object per line."""
    overwrite: bool = False
    """Replace OUT."""

    def run(self) -> dict[str, Any]:
        """Scan; return the counts, the flagged conversations and the drift alarms."""
        from weightwatch.conversations import read_conversations, tokenize
        from weightwatch.growing import growing
        from weightwatch.model_command import positions
        from weightwatch.scanning import scan
        from weightwatch.state import State, digest
        from weightwatch.verdicts import drift_of, scores_of, verdicts, warn_of_unseen

        if self.out is not None:
            check_apart(self.out, [self.state, self.data, Path(self.model)])
        state = State.open(self.state)
        bounds, scores = state.calibration.bounds(self.rule, self.level), scores_of(state.calibration)
        if self.events < 1:
            raise UserError("--events must be at least 1")
        read = read_conversations(self.data)
        model, tokenizer = self.load()
        state.require(model)
        chats = [*tokenize(read, tokenizer, max_length=min(self.max_length, positions(model)))]
        warn_of_unseen(bounds, (role for one in chats for role in {*one.roles.tolist()}))
        config = {
            **state.config,
            "rule": dict(bounds.rule),
            "conversations": digest(chats),
            "events": self.events,
            "batch": self.batch_tokens,
        }
        options = {"batch_tokens": self.batch_tokens, "skip_first": state.config["skip_first"]}
        labels = [label for labels in state.bank.labels for label in labels]
        with growing(self.out, config, overwrite=self.overwrite) as file:
            for chunk, peaks in scan(model, state.bank, chats, start=len(file.rows), progress=True, **options):
                some = chats[chunk.start : chunk.stop]
                ids = [one.id for one in some]
                tokens = [dict(enumerate(one.input_ids.tolist())) for one in some]
                file.add(verdicts(ids, peaks, bounds, scores, labels, tokens.__getitem__, tokenizer, most=self.events))
        flagged = [row for row in file.rows if row["flagged"]]
        return {
            "inputs": len(file.rows), "flagged": len(flagged), "rule": dict(bounds.rule), "drift": drift_of(scores, file.rows),
            "out": None if self.out is None else str(self.out), "verdicts": flagged,
        }  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Print a line per flagged conversation, the counts and the drift alarms."""
        print_table([_row(one) for one in result["verdicts"]])
        rule = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in result["rule"].items()
        )
        print(f"{result['flagged']} of {result['inputs']} conversations flagged ({rule})")
        for alarm in result["drift"]["alarms"]:
            print(
                f"drift: the scores of block {alarm['block']} are not those of the calibration (p {alarm['p_value']:.2g}): calibrate anew"
            )
        if result["drift"]["why"]:
            print(f"drift was not tested: {result['drift']['why']}")
        if result["out"]:
            print(f"wrote {result['out']}")


def _row(verdict: dict[str, Any]) -> dict[str, str]:
    worst = verdict["events"][0]
    margin = "-" if worst["margin"] is None else f"{worst['margin']:.3f}"
    p = "-" if verdict["p_value"] is None else f"{verdict['p_value']:.2g}"
    where = f"{worst['role']} {worst['position']}"
    return {
        "conversation": verdict["id"], "p": p, "direction": worst["label"], "beyond by": margin, "token": repr(worst["text"]),
        "at": where, "directions": str(verdict["exceeded"]),
    }  # fmt: skip
