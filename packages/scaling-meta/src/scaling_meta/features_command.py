"""The command `scaling-meta features`."""

import csv
import io
import math
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lmcore.cli import Command
from lmcore.errors import UserError

if TYPE_CHECKING:
    from scaling_meta.sampling import FreeText


@dataclass(frozen=True, kw_only=True)
class Features(Command):
    """Let a model write freely and describe what it writes: lengths, diversity, entropies, keywords, code, markup, English.

    Writes texts.jsonl, features.json with every feature, and features.csv with those that are columns of the paper's table, which
    `scaling-meta import` reads. With --texts no model is needed. A run that was stopped is continued by the same command.
    """

    model: tyro.conf.Positional[str | None] = None
    """Folder or Hub id of the model, or smollm2."""
    texts: Path | None = None
    """Texts to describe instead: .jsonl, an object with the key text in each line, or .txt, a text in each line."""
    out: Path
    """Folder for the results."""
    name: str | None = None
    """Name of the model in features.csv; by default the Hub id, or the name of the folder or file."""
    samples: int = 256
    """Number of texts."""
    max_tokens: int = 256
    """A text is cut off after so many tokens. The paper's reach about 2,300, and lengths depend on it."""
    temperature: float = 1.0
    """Divides the logits; 1 is the model's own distribution."""
    top_p: float = 1.0
    """Keep the most probable tokens that make up this probability."""
    batch_size: int = 32
    """Texts drawn together."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer for num_tokens, unique_tokens and ttr, which are left out otherwise; the paper's is Llama 2's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype to compute in."""
    device: str | None = None
    """Where to run, e.g. cpu or cuda:1; by default the GPU if there is one."""

    def run(self) -> dict[str, Any]:
        """Sample or read the texts, write the files, and return the features; null is what no text has."""
        from lmcore.record import write_atomically, write_json
        from scaling_meta.text_features import text_features

        if (self.model is None) == (self.texts is None):
            raise UserError("give either a MODEL to sample or --texts to read")
        encode = _encoder(self.tokenizer) if self.tokenizer else None
        texts, facts = self._read() if self.texts else self._sample()
        features = text_features(texts, encode(texts) if encode else None)
        result = {
            "model": self.name or _name(self.model or str(self.texts)),
            "texts": len(texts),
            "empty": sum(not text for text in texts) / len(texts),
            **facts,
            "tokenizer": self.tokenizer,
            "features": {name: value if math.isfinite(value) else None for name, value in features.items()},
        }
        write_atomically(self.out / "features.csv", _csv(result["model"], features))
        write_json(self.out / "features.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the features, and how to import them."""
        from lmcore.cli import print_table

        print_table(
            [{"feature": name, "value": "-" if value is None else f"{value:.4g}"} for name, value in result["features"].items()]
        )
        if "ended" in result:
            print(
                f"{result['ended']:.1%} of {result['texts']} texts were ended by the model, the others cut off at --max-tokens"
            )
        print(f"wrote {self.out}; next: scaling-meta import {self.out / 'features.csv'} --into DATABASE")

    def _read(self) -> tuple[list[str], dict[str, Any]]:
        from lmcore.record import Run

        assert self.texts is not None
        texts = read_texts(self.texts)
        digest = blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
        Run(self.out, {"texts": digest})
        return texts, {}

    def _sample(self) -> tuple[list[str], dict[str, Any]]:
        import torch

        from lmcore.models import load_causal_lm
        from scaling_meta.sampling import Sampling, sample_texts

        assert self.model is not None
        names = ("samples", "max_tokens", "temperature", "top_p", "batch_size", "seed")
        sampling = Sampling(**{name: getattr(self, name) for name in names})
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
            raise UserError(f"--device {device} cannot be used here: {str(error).partition('. ')[0]}") from None
        model, tokenizer = load_causal_lm(self.model, dtype=getattr(torch, self.dtype), device=device)
        drawn: list[FreeText] = sample_texts(model, tokenizer, self.out, sampling)
        ended = sum(text.ended for text in drawn) / len(drawn)
        return [text.text for text in drawn], {"ended": ended, "sampling": asdict(sampling)}


def read_texts(path: Path) -> list[str]:
    """Read texts from .jsonl, an object with the key `text` in each line, or .txt, a text in each line; blank lines are left out.

    Raises: `UserError` naming file and line of what is something else.
    """
    import orjson

    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(
            f"{path}: give a .jsonl file, an object with the key text in each line, or a .txt file, a text in each line"
        )
    try:
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                texts.append(orjson.loads(line)["text"] if path.suffix == ".jsonl" else line.decode().rstrip("\r"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8") from None
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        except (KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not an object with the key text") from None
        if texts and not isinstance(texts[-1], str):
            raise UserError(f"{path}, line {number}: text is {type(texts[-1]).__name__}, not a string")
    if not texts:
        raise UserError(f"{path} holds no texts")
    return texts


def _csv(model: str, features: dict[str, float]) -> str:
    """One row for the model, as `importers.plain` reads it: the columns of the paper's table with `gen_` before."""
    from scaling_meta.schema import GENERATION

    names = [name for name in GENERATION if math.isfinite(features.get(name.removeprefix("gen_"), math.nan))]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [["model", *names], [model, *(repr(features[name.removeprefix("gen_")]) for name in names)]]
    )
    return file.getvalue()


def _encoder(source: str) -> Any:
    """Return a function from texts to the ids of their tokens."""
    from transformers import AutoTokenizer

    from lmcore.models import smollm2_folder

    try:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder() if source == "smollm2" else source)
    except Exception as error:  # whatever transformers meets in a broken folder
        raise UserError(f"--tokenizer {source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return lambda texts: tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def _name(source: str) -> str:
    path = Path(source)
    return path.resolve().stem if path.is_file() else path.resolve().name if path.is_dir() else source
