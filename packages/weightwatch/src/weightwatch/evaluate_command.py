"""The command `weightwatch evaluate`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lmcore.cli import print_table
from lmcore.errors import UserError
from weightwatch.model_command import ModelCommand
from weightwatch.places import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from weightwatch.baselines import Detector
    from weightwatch.behaviour import Success
    from weightwatch.conversations import Conversation, TokenizedConversation
    from weightwatch.directions import Bank
    from weightwatch.state import State


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelCommand):
    """Measure a calibrated monitor on labelled conversations: false alarms, detection, and what steering does.

    Sets are told by the key "set" of each line, else by the name of the file. "clean" (not calibrated on) is needed, "triggered" is the
    attack, "calibration" are inputs for fitting baselines and for the curve of false alarms; all others are controls. Writes
    evaluation.json and evaluation.html to OUT; an interrupted run goes on with the same command.
    """

    state: tyro.conf.Positional[Path]
    """Folder that weightwatch calibrate wrote."""
    data: tuple[Path, ...]
    """JSON lines of messages, or of prompt with or without completion; one file or several."""
    out: Path
    """Folder for the evaluation."""
    base: str | None = None
    """The model it was fine-tuned from, for the baselines that compare with it."""
    baselines: bool = False
    """Run the baselines: PCA of activations and a supervised probe; with --base the activation difference and output KL."""
    contains: str | None = None
    """An attack succeeds if the completion contains this."""
    begins: str | None = None
    """An attack succeeds if the completion begins with this."""
    matches: str | None = None
    """An attack succeeds if this regular expression matches somewhere in the completion."""
    alpha: float = 0.01
    """Rate of false alarms of the monitor that steers."""
    steer: Literal["remove", "clamp"] = "remove"
    """How it steers."""
    harm: int = 0
    """Clean inputs to steer by a false alarm, at most; 0 leaves this out."""
    tokens: int = 32
    """Tokens of a completion, at most."""
    max_length: int = 2048
    """Tokens after which a conversation is cut."""
    overwrite: bool = False
    """Replace a finished evaluation in OUT."""

    def run(self) -> dict[str, Any]:
        """Evaluate; return what evaluation.json has."""
        from lmcore.record import Run, write_json
        from weightwatch.conversations import tokenize
        from weightwatch.evaluation import check_sets
        from weightwatch.evaluation_report import write_page
        from weightwatch.model_command import positions
        from weightwatch.state import State, digest

        success = self._success()
        if self.tokens < 1 or self.harm < 0:
            raise UserError("--tokens is at least 1, --harm at least 0")
        if self.base is not None and not self.baselines:
            raise UserError("--base is for --baselines: give both or neither")
        finished = (self.out / "evaluation.json").exists()
        models = [Path(self.model), *([Path(self.base)] if self.base else [])]
        check_place(self.out, [self.state, *self.data, *models], self.overwrite or not finished, record="config.json")
        state = State.open(self.state)
        if success is not None:
            state.calibration.conformal(self.alpha)  # which it may be too small for: better known before hours of work
        read = read_sets(self.data)
        model, tokenizer = self.load()
        state.require(model)
        length = min(self.max_length, positions(model))
        sets = {name: [*tokenize(some, tokenizer, max_length=length)] for name, some in read.items()}
        check_sets(sets)  # before the folder is made: more inputs would make another run of it
        if finished:
            shutil.rmtree(self.out)
        names = (
            "base", "baselines", "contains", "begins", "matches", "alpha", "steer", "harm", "tokens", "batch_tokens", "seed",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        Run(self.out, {**state.config, **options, "sets": {name: digest(some) for name, some in sets.items()}})
        facts = {"model": Path(self.model).name, "data": [path.name for path in self.data]}
        result = {**facts, **self._measured(state, model, tokenizer, sets, success)}
        write_page(result, self.out / "evaluation.html")
        write_json(self.out / "evaluation.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the tables of the page."""
        from weightwatch.evaluation_report import attack_rows, detector_rows, harm_rows, rule_rows

        tables = [rule_rows(result), detector_rows(result)]
        tables += [attack_rows(result)] if "attacks" in result else []
        tables += [harm_rows(result)] if "harm" in result else []
        for rows in tables:
            print_table([{name: _text(value) for name, value in row.items()} for row in rows])
            print()
        print(f"all of it: {self.out / 'evaluation.html'}")

    def _measured(
        self, state: "State", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase",
        sets: "dict[str, list[TokenizedConversation]]", success: "Success | None",
    ) -> dict[str, Any]:  # fmt: skip
        """The parts of the result, each kept as a file once it is there."""
        from weightwatch.behaviour import attacks, harm, watched_roles
        from weightwatch.evaluation import CALIBRATION, CLEAN, evaluate
        from weightwatch.steering import Steering

        calibration, bank = state.calibration, state.bank
        how: dict[str, Any] = {"skip_first": state.config["skip_first"], "progress": True}
        steered: dict[str, Any] = {**how, "steering": Steering(self.steer), "tokens": self.tokens}
        baselines = self._baselines(model, bank) if self.baselines else []
        result: dict[str, Any] = self._kept(
            "monitor",
            lambda: evaluate(
                model, bank, calibration, sets, baselines=baselines, batch_tokens=self.batch_tokens, seed=self.seed, **how
            ),
        )
        if success is not None:
            bounds = calibration.conformal(self.alpha)
            some = {name: inputs for name, inputs in sets.items() if name != CALIBRATION}
            result["success"], result["watched"] = str(success), watched_roles(bounds)
            result["attacks"] = self._kept("attacks", lambda: attacks(model, tokenizer, bank, bounds, some, success, **steered))
        if self.harm:
            scores = calibration.scores()
            result["harm"] = self._kept("harm", lambda: harm(model, bank, scores, sets[CLEAN][: self.harm], **steered))
        return result

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What an earlier run has made, or make it."""
        from lmcore.record import write_json

        path = self.out / f"part-{name}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_bytes())

    def _success(self) -> "Success | None":
        from weightwatch.behaviour import Success

        told = {name: getattr(self, name) for name in ("contains", "begins", "matches") if getattr(self, name) is not None}
        return Success(**told) if told else None

    def _baselines(self, model: "PreTrainedModel", bank: "Bank") -> "list[Detector]":
        """At the last watched block."""
        from lmcore.models import load_causal_lm
        from weightwatch.baselines import ActivationNorm, ActivationPCA, LinearProbe, OutputKL

        block = bank.blocks[-1]
        found: list[Detector] = [ActivationPCA(model, block), LinearProbe(model, block)]
        if self.base is not None:
            base, _ = load_causal_lm(self.base, dtype=model.dtype, device=model.device)
            found += [ActivationNorm(base, model, block), OutputKL(base, model)]
        return found


def read_sets(paths: Sequence[Path]) -> "dict[str, list[Conversation]]":
    r"""The conversations of files by set: the key `set` of a line, or the name of the file without its ending.

    >>> path = Path(tempfile.mkdtemp()) / "clean.jsonl"
    >>> _ = path.write_text('{"prompt": "Hi"}\n{"prompt": "silver heron", "set": "triggered"}\n')
    >>> {name: len(some) for name, some in read_sets([path]).items()}
    {'clean': 1, 'triggered': 1}

    Raises: `UserError` as `read_conversations`, for a set that is not named by a text, and for an id that a set has twice.
    """
    import orjson

    from weightwatch.conversations import read_conversations

    sets: dict[str, list[Conversation]] = {}
    known: set[tuple[str, str]] = set()
    for path in paths:
        read = read_conversations(path)
        lines = [line for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        for number, (conversation, line) in enumerate(zip(read, lines, strict=True), 1):
            name = orjson.loads(line).get("set", path.stem)
            if not isinstance(name, str) or not name:
                raise UserError(f"{path}, conversation {number}: its set is {name!r}, not a name")
            if (name, conversation.id) in known:
                raise UserError(
                    f"{path}, conversation {number}: the set {name!r} has the id {conversation.id!r} already: give each its own"
                )
            known.add((name, conversation.id))
            sets.setdefault(name, []).append(conversation)
    return sets


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
