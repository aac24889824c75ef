"""The data of a task: what is deleted when a task, or one example of it, is forgotten."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lmcore.errors import UserError
from siftmasks.settings import SiftSettings

_KINDS = {"prompt": "completion", "text": "label"}


@dataclass(frozen=True)
class Example:
    """One example: an id, unique within its task, and what the loss reads (from files: prompt and completion, or text and label)."""

    id: str
    fields: Mapping[str, Any]


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a task: JSON lines, plain or gzipped, of `prompt` and `completion` or of `text` and `label`.

    Prompt, completion and text are strings, the label is a string or a whole number; other keys are ignored. `id` is a string of the
    user's, once in the file, or a whole number, which stands for its digits: 5 is "5"; without it, the id is a hash of the content
    (BLAKE2b of the two fields as JSON, 16 bytes in hex). Equal contents without ids are different examples, HASH, HASH-2, HASH-3: what
    counts is how often a content is there, never where. To forget such a content means to forget all of them. The order of the file makes
    no difference to training.

    Raises: `UserError` naming file and line for what is no JSON object, lacks a field, has one of another type, is of another kind than
    the lines before or repeats an id; naming the file if it is missing, damaged or holds no example.
    """
    return examples_of(path, read_lines(path))


@dataclass(frozen=True)
class Line:
    """A line of a file: its number, counted from 1, the id and the fields of its example, and what the key `task` has, if anything."""

    number: int
    id: str | None
    fields: dict[str, Any]
    task: Any


def examples_of(path: Path, lines: Iterable[Line]) -> list[Example]:
    """Do as `read_examples` with some lines of a file."""
    examples: list[Example] = []
    place: dict[str, int] = {}
    copies: dict[str, int] = {}
    kind = None
    for line in lines:
        where, given = f"{path}, line {line.number}", line.id
        if kind not in (None, line.fields.keys()):
            raise UserError(f"{where}: has {' and '.join(line.fields)}, the lines before have {' and '.join(kind or ())}")
        kind = line.fields.keys()
        if given is None:
            given = hashlib.blake2b(json.dumps(line.fields, sort_keys=True).encode(), digest_size=16).hexdigest()
            copies[given] = copies.get(given, 0) + 1
            given += f"-{copies[given]}" if copies[given] > 1 else ""
        if given in place:
            raise UserError(f"{where}: the id {given!r} is that of line {place[given]} already: give each example its own")
        place[given] = line.number
        examples.append(Example(given, line.fields))
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def batches(examples: Sequence[Example], settings: SiftSettings, task: str) -> list[list[Example]]:
    """Return the examples of each of the `settings.steps` steps: a function of settings, task and the set of examples alone.

    Epoch e takes the examples in the order of a hash of task seed, e and example id (BLAKE2b, 16 bytes); the epochs follow each other
    without a gap and are cut into batches of `batch_size`, or of all examples if there are fewer, or if it is None.

    Raises: `UserError` if there is no example, or two have one id.
    """
    if not examples:
        raise UserError(f"task {task!r} has no example")
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        raise UserError(f"task {task!r} has the example {max(ids, key=ids.count)!r} more than once")
    key = settings.task_seed(task).to_bytes(8, "little")
    size = min(settings.batch_size or len(examples), len(examples))
    stream: list[Example] = []
    for epoch in range(-(-settings.steps * size // len(examples))):

        def place(example: Example, epoch: int = epoch) -> bytes:
            return hashlib.blake2b(epoch.to_bytes(8, "little") + example.id.encode(), key=key, digest_size=16).digest()

        stream += sorted(examples, key=place)
    return [stream[step * size : (step + 1) * size] for step in range(settings.steps)]


def read_lines(path: Path) -> Iterator[Line]:
    """Parse the lines that are not blank. Raises: `UserError` naming file and line, as `read_examples` does."""
    for number, text in _numbered(path):
        yield _parse(path, number, text)


def _parse(path: Path, number: int, text: bytes) -> Line:
    where = f"{path}, line {number}"
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {str(record)[:40]}")
    kinds = [first for first, second in _KINDS.items() if first in record and second in record]
    if len(kinds) != 1:
        raise UserError(f"{where}: needs prompt and completion, or text and label; it has {', '.join(record) or 'no keys'}")
    fields = {name: record[name] for name in (kinds[0], _KINDS[kinds[0]])}
    for name, value in fields.items():
        if not (isinstance(value, str) or (name == "label" and type(value) is int)):
            raise UserError(
                f"{where}: {name} is {str(value)[:40]}, not a string{' or a whole number' if name == 'label' else ''}"
            )
    if fields.get("completion", fields.get("label")) == "":
        raise UserError(f"{where}: the {_KINDS[kinds[0]]} is empty: there is nothing to learn")
    return Line(number, named(where, "id", record.get("id")), fields, record.get("task"))


def named(where: str, key: str, value: Any) -> str | None:
    """Return the name that a key of a line has, if it has one; a whole number is named by its digits. Raises: `UserError` for all else."""
    name = str(value) if type(value) is int else value
    if name is None or (isinstance(name, str) and name):
        return name
    raise UserError(f"{where}: {key} is {json.dumps(value)[:40]}, not a string with a character in it or a whole number")


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as raw:
            compressed = raw.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if compressed else raw, 1):
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated gzip ({error}): copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
