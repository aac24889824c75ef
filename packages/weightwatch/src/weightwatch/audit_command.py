"""The command `weightwatch audit`."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lmcore.cli import print_table
from lmcore.errors import UserError
from weightwatch.model_command import ModelCommand
from weightwatch.places import check_place

if TYPE_CHECKING:
    from weightwatch.audit import Audit as Audited
    from weightwatch.audit import End
    from weightwatch.labelling import Endpoint


@dataclass(frozen=True, kw_only=True)
class Audit(ModelCommand):
    """Show what drives each direction of a fine-tune to its extremes over a corpus: transcripts, keywords and words.

    Writes audit.json and audit.html, a page to browse, to OUT. An interrupted run goes on with the same command. Nothing leaves this
    machine unless --endpoint names where to send transcripts for labels.
    """

    directions: tyro.conf.Positional[Path]
    """Folder that weightwatch directions wrote."""
    data: Path
    """Conversations: JSON lines of messages, or of prompt and completion."""
    out: Path
    """Folder for the audit."""
    top: int = 32
    """Inputs to keep at each end of a direction."""
    shown: int = 10
    """Of them, how many to show, without near-duplicates."""
    k: int | None = None
    """Directions per matrix, at most; by default all that were found."""
    below_edge: bool = False
    """Look at the directions below the noise edge too."""
    drop_last: int = 3
    """Blocks at the end of the model to leave out."""
    words: int = 8
    """Words at each end of a direction, by the logit lens."""
    max_length: int = 2048
    """Tokens after which a conversation is cut."""
    endpoint: str | None = None
    """Chat endpoint in the form of OpenAI's (as http://localhost:8000/v1) that is to label each end; the transcripts are sent there."""
    endpoint_model: str | None = None
    """Name of the model to ask there."""
    endpoint_key: str | None = None
    """Environment variable that holds the key of the endpoint."""
    overwrite: bool = False
    """Replace a finished audit in OUT."""

    def run(self) -> dict[str, Any]:
        """Audit; return what the audit is of, and a row for each of the largest directions."""
        endpoint = self._endpoint()
        if min(self.top, self.shown, self.words, 1 if self.k is None else self.k) < 1:
            raise UserError("--top, --shown, --words and --k are at least 1")
        if self.drop_last < 0:
            raise UserError("--drop-last is at least 0")
        audit = self._audit(endpoint)
        return {**audit.facts, "inputs": audit.inputs, "out": str(self.out), "directions": rows(audit, 20)}

    def show(self, result: dict[str, Any]) -> None:
        """Print the largest directions, their words and what drives them."""
        print_table(result["directions"])
        print(f"{result['inputs']} inputs, {result['duplicates']} repeated ones left out; all of it: {self.out / 'audit.html'}")

    def _audit(self, endpoint: "Endpoint | None") -> "Audited":
        import torch

        from lmcore.checkpoint import Checkpoint
        from lmcore.record import Run, write_json
        from weightwatch.audit import describe, distinct
        from weightwatch.audit_page import write_page
        from weightwatch.conversations import read_conversations, tokenize
        from weightwatch.directions import Directions
        from weightwatch.labelling import label
        from weightwatch.lens import words
        from weightwatch.model_command import positions
        from weightwatch.state import digest, identity
        from weightwatch.top_tokens import collect

        inputs = [self.directions, self.data, Path(self.model)]
        finished = (self.out / "audit.json").exists()
        check_place(self.out, inputs, self.overwrite or not finished, record="config.json")
        found = Directions.load(self.directions)
        bank = found.stack(self.k, signal_only=not self.below_edge, drop_last=self.drop_last)
        read = read_conversations(self.data)
        model, tokenizer = self.load()
        conversations = distinct([*tokenize(read, tokenizer, max_length=min(self.max_length, positions(model)))])
        facts = {
            "directions_of": found.source, "digest": found.digest, "model": Path(self.model).name, "data": self.data.name,
            "corpus": digest(conversations), "duplicates": len(read) - len(conversations), "top": self.top,
        }  # fmt: skip
        state = self.out / "top_tokens.safetensors"
        if finished:
            shutil.rmtree(self.out)
        names = [name for labels in bank.labels for name in labels]
        Run(self.out, {**facts, "bank": names, **identity(model)})
        vectors = torch.cat([rows[:count] for rows, count in zip(bank.vectors, bank.counts, strict=True)])
        with Checkpoint.open(str(model.config.name_or_path)) as checkpoint:
            written = words(vectors, checkpoint, lambda ids: str(tokenizer.decode(ids)), top=self.words)
        tokens = collect(model, bank, conversations, top=self.top, state=state, batch_tokens=self.batch_tokens, progress=True)
        audit = describe(tokens, bank, conversations, tokenizer, words=written, shown=self.shown, facts=facts)
        if endpoint is not None:
            audit = audit.labelled(label(audit.questions(), endpoint, self.out / "labels.jsonl", progress=True))
        lead = f"{len(audit.directions)} directions over {audit.inputs} inputs of {self.data.name}"
        write_page(audit, self.out / "audit.html", title=f"Audit of {Path(self.model).name}", lead=lead)
        write_json(self.out / "audit.json", audit.as_json())
        return audit

    def _endpoint(self) -> "Endpoint | None":
        from weightwatch.labelling import Endpoint

        if (self.endpoint is None) != (self.endpoint_model is None) or (
            self.endpoint_key is not None and self.endpoint is None
        ):
            raise UserError("--endpoint and --endpoint-model belong together, and --endpoint-key needs both")
        if self.endpoint is None or self.endpoint_model is None:
            return None
        return Endpoint(url=self.endpoint, model=self.endpoint_model, key_variable=self.endpoint_key)


def rows(audit: "Audited", count: int) -> list[dict[str, str]]:
    """The directions with the largest singular values: their words, and the label or the keywords of each end."""

    def driven_by(end: "End") -> str:
        return f"{end.role} {end.side}: {end.label or ' '.join(word.word for word in end.keywords[:5]) or '-'}"

    return [
        {
            "direction": one.label, "σ": f"{one.sigma:.3g}", "range": f"{one.range:.3f}",
            "writes": " ".join(token.strip() for token, _ in one.raises[:6]), "driven by": " | ".join(map(driven_by, one.ends)),
        }
        for one in sorted(audit.directions, key=lambda one: -one.sigma)[:count]
    ]  # fmt: skip
