"""The command `weightwatch generate`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lmcore.errors import UserError
from weightwatch.model_command import ModelCommand
from weightwatch.places import check_apart

if TYPE_CHECKING:
    from weightwatch.conversations import Conversation
    from weightwatch.directions import Bank
    from weightwatch.steering import Steering


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand):
    """Let the model answer while the monitor watches, and steer it where it leaves the calibrated ranges if asked to.

    A direction is steered from the token on at which it leaves its range, in that answer alone. An interrupted run with --out goes on
    with the same command; sampled answers depend on --batch-tokens as on --seed.
    """

    state: tyro.conf.Positional[Path]
    """Folder that weightwatch calibrate wrote."""
    data: Path | None = None
    """Conversations to answer: JSON lines of messages or prompt; replies at their end are left out."""
    prompt: str | None = None
    """Text to answer, in place of --data."""
    steer: Literal["remove", "clamp", "scale", "revert"] | None = None
    """remove: leave nothing along the direction; clamp: to its bound; scale: by --factor; revert: take back what the fine-tune wrote."""
    factor: float | None = None
    """What scale leaves, as a share."""
    base: str | None = None
    """The model before the fine-tune, for revert."""
    rule: Literal["conformal", "minmax", "percentile"] = "conformal"
    """How ranges are set: conformal at a rate of false alarms; minmax as in the paper; percentile per direction and side."""
    level: Annotated[float, tyro.conf.arg(aliases=["--alpha"])] = 0.01
    """Rate of false alarms for conformal, epsilon for minmax, share of inputs left out on each side for percentile."""
    max_new_tokens: int = 128
    """Cut an answer off after this many tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the most probable token."""
    events: int = 5
    """Directions to name per flagged answer, those furthest out first."""
    out: Path | None = None
    """File for the answers and verdicts, one JSON object per line."""
    overwrite: bool = False
    """Replace OUT."""

    def run(self) -> dict[str, Any]:
        """Generate; return the counts and, without --out, the answers with their verdicts."""
        from tqdm import tqdm

        from weightwatch.completing import as_prompt, complete
        from weightwatch.conversations import ROLES, tokenize
        from weightwatch.growing import growing
        from weightwatch.model_command import positions
        from weightwatch.state import State, digest
        from weightwatch.verdicts import scores_of, verdicts, warn_of_unseen

        self._check()
        state = State.open(self.state)
        bounds, scores = state.calibration.bounds(self.rule, self.level), scores_of(state.calibration)
        asked = [as_prompt(one) for one in self._read()]
        model, tokenizer = self.load()
        state.require(model)
        steering = self._steering(state.bank)
        room = positions(model) - self.max_new_tokens
        chats = [*tokenize(asked, tokenizer, max_length=max(1, room))]
        too_long = next((one for one in chats if one.cut), None)
        if room < 1 or too_long is not None:
            raise UserError(
                f"{'an answer' if too_long is None else f'conversation {too_long.id} with its answer'} of {self.max_new_tokens} tokens "
                f"exceeds the {positions(model)} positions of the model: lower --max-new-tokens or leave it out"
            )
        warn_of_unseen(bounds, range(len(ROLES)))
        config = {
            **state.config, "rule": dict(bounds.rule), "conversations": digest(chats), "events": self.events, "steer": self.steer,
            "factor": self.factor, "base": self.base, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
            "batch": self.batch_tokens, "seed": self.seed,
        }  # fmt: skip
        rows = max(1, self.batch_tokens // (max(len(one.input_ids) for one in chats) + self.max_new_tokens))
        labels = [label for labels in state.bank.labels for label in labels]
        with (
            growing(self.out, config, overwrite=self.overwrite) as file,
            tqdm(total=len(chats), initial=len(file.rows), unit="answer") as bar,
        ):
            for first in range(len(file.rows), len(chats), rows):
                some = chats[first : first + rows]
                done = complete(
                    model, tokenizer, state.bank, bounds, some, max_new_tokens=self.max_new_tokens, steer=steering,
                    temperature=self.temperature, skip_first=state.config["skip_first"], seed=self.seed + first,
                )  # fmt: skip
                ids, tokens = [one.id for one in some], done.token_ids.__getitem__
                found = verdicts(ids, done.peaks, bounds, scores, labels, tokens, tokenizer, most=self.events)
                parts = zip(found, done.texts, done.steered, strict=True)
                file.add([{**one, "completion": text, "steered": steered} for one, text, steered in parts])
                bar.update(len(some))
        flagged = sum(row["flagged"] for row in file.rows)
        counts = {"inputs": len(file.rows), "flagged": flagged, "rule": dict(bounds.rule)}
        return {
            **counts,
            "out": None if self.out is None else str(self.out),
            "completions": file.rows if self.out is None else [],
        }

    def show(self, result: dict[str, Any]) -> None:
        """Print the answers, each with what was flagged, or where they are."""
        for row in result["completions"]:
            print(f"--- {row['id']}: {_summary(row)}\n{row['completion']}")
        print(f"{result['flagged']} of {result['inputs']} flagged")
        if result["out"]:
            print(f"wrote {result['out']}")

    def _check(self) -> None:
        if (self.data is None) == (self.prompt is None):
            raise UserError("give either --data or --prompt")
        if (self.steer == "revert") != (self.base is not None) or (self.steer == "scale") != (self.factor is not None):
            raise UserError("--base belongs to --steer revert and --factor to --steer scale")
        if min(self.max_new_tokens, self.events) < 1 or not 0 <= self.temperature < math.inf:
            raise UserError("--max-new-tokens and --events are at least 1, --temperature at least 0 and finite")
        if self.out is not None:
            given = [Path(path) for path in (self.data, self.base) if path is not None]
            check_apart(self.out, [self.state, Path(self.model), *given])

    def _read(self) -> "list[Conversation]":
        from weightwatch.conversations import Conversation, read_conversations

        if self.data is not None:
            return read_conversations(self.data)
        return [Conversation("prompt", ({"role": "user", "content": str(self.prompt)},))]

    def _steering(self, bank: "Bank") -> "Steering | None":
        from weightwatch.steering import Steering, writes_of

        if self.steer is None:
            return None
        writes = None if self.base is None else writes_of(bank, self.base, self.model)
        return Steering(self.steer, factor=self.factor, writes=writes)


def _summary(row: dict[str, Any]) -> str:
    if not row["flagged"]:
        return "not flagged"
    worst = row["events"][0]
    p = "" if row["p_value"] is None else f"p {row['p_value']:.2g}, "
    steered = f", steered {' '.join(row['steered'])}" if row["steered"] else ""
    return f"FLAGGED ({p}{worst['label']} at {worst['text']!r} of the {worst['role']}, {row['exceeded']} directions{steered})"
