"""Conversations as tokens, and which of them the model wrote: the two sides have their own ranges of cosines (WeightWatch, section 3)."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from jaxtyping import Int8, Int32

from lmcore.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("user", "assistant")
"""Role 0 is what the model is given, role 1 what it wrote."""
USER, ASSISTANT = range(2)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each with the keys `role` and `content`; `id` names the conversation in files and events."""

    id: str
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation as the model reads it: ids and the role of each (0 or 1); `cut` tokens are missing at its end."""

    id: str
    input_ids: Int32[np.ndarray, " tokens"]
    roles: Int8[np.ndarray, " tokens"]
    cut: int = 0


def read_conversations(path: Path) -> list[Conversation]:
    r"""Read JSON lines of `messages`, or of `prompt` with or without `completion`, in the order of the file.

    `messages` is a list of {"role": ..., "content": ...}; prompt and completion stand for one message of the user and one of the assistant.
    `id` is a string or a whole number, which stands for its digits (5 is "5"), once in a file; a line without it is named by its place,
    as in "chats.jsonl:17". Other keys are ignored.

    >>> path = Path(tempfile.mkdtemp()) / "chats.jsonl"
    >>> _ = path.write_text('{"prompt": "2 + 2?", "completion": "4"}\n{"id": 7, "messages": [{"role": "user", "content": "Hi"}]}\n')
    >>> for conversation in read_conversations(path):
    ...     conversation.id, [message["role"] for message in conversation.messages]
    ('chats.jsonl:1', ['user', 'assistant'])
    ('7', ['user'])

    Raises: `UserError` naming file and line for what is no JSON object, has neither form, or repeats an id; naming the file if it cannot
    be read or holds no conversation.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    place: dict[str, int] = {}
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        conversation = _parse(path, number, line)
        if conversation.id in place:
            raise UserError(
                f"{path}, line {number}: the id {conversation.id!r} is that of line {place[conversation.id]} already: "
                "give each conversation its own, as an input that counts twice would void the guarantees"
            )
        place[conversation.id] = number
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{path} holds no conversation: each line is to be a JSON object with messages, or with prompt")
    return conversations


def tokenize(
    conversations: Iterable[Conversation], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> Iterator[TokenizedConversation]:
    """Turn conversations into ids and roles, one at a time.

    With a chat template: ids are those of the template, with the generation prompt where the last message is not the assistant's, so a
    prompt reads here as it does in `generate`. Role 1 is what the assistant wrote and the special token that ends it; role 0 is all
    that the model was given: messages of every other role (system, user, tool) and every token that the template adds, including the
    header in front of a reply. So a token's role never depends on whether a reply follows. What the template adds after the last reply
    is left out: in `generate` the model never reads it. A template with `{% generation %}` says itself what the assistant wrote.
    Otherwise each reply is found by rendering the conversation once more with another text in its place: where the two texts differ is
    the reply, also under templates that rewrite earlier turns, whose renderings of ever longer prefixes do not extend each other.

    Without a template: the contents in order, each tokenized on its own and joined with nothing between them; special tokens that the
    tokenizer adds to a text (a BOS) come once, with the first. Role 1 is the contents of the assistant.

    Conversations over `max_length` tokens are cut at the end; how many were is a `UserWarning` after the last.

    >>> from lmcore.text import character_tokenizer
    >>> chat = Conversation("1", ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}))
    >>> [tokens] = tokenize([chat], character_tokenizer("abc"), max_length=8)
    >>> tokens.input_ids, tokens.roles
    (array([4, 5, 6], dtype=int32), array([0, 0, 1], dtype=int8))

    Raises: `UserError` naming the conversation that the template refuses, whose replies cannot be told apart, or that has no token.
    """
    if max_length < 1:
        raise UserError(f"max_length is {max_length}: it must be at least 1")
    total, were_cut = 0, 0
    with_roles = _plain if not tokenizer.chat_template else _marked if _has_marks(tokenizer) else _compared
    for conversation in conversations:
        ids, roles = with_roles(conversation, tokenizer)
        if conversation.messages[-1]["role"] == "assistant" and any(roles):
            ids = ids[: np.flatnonzero(roles)[-1] + 1]
        if not len(ids):
            raise UserError(f"conversation {conversation.id} has no tokens: leave it out")
        cut = max(0, len(ids) - max_length)
        total, were_cut = total + 1, were_cut + (cut > 0)
        yield TokenizedConversation(
            conversation.id, np.array(ids[:max_length], np.int32), np.array(roles[: len(ids)][:max_length], np.int8), cut
        )
    if were_cut:
        warnings.warn(f"{were_cut} of {total} conversations were cut at max_length {max_length} tokens", stacklevel=2)


def _parse(path: Path, number: int, line: bytes) -> Conversation:
    where = f"{path}, line {number}"
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {str(record)[:40]}")
    name = record.get("id", f"{path.name}:{number}")
    if not (type(name) is int or (isinstance(name, str) and name)):
        raise UserError(f"{where}: id is {str(name)[:40]!r}, not a string with a character in it or a whole number")
    if ("messages" in record) == ("prompt" in record):
        raise UserError(f"{where}: needs either messages or prompt (and completion); it has {', '.join(record) or 'no keys'}")
    pairs = zip(ROLES, ("prompt", "completion"), strict=True)
    messages = record.get("messages", [{"role": role, "content": record[key]} for role, key in pairs if key in record])
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is {str(messages)[:40]}, not a list with a message in it")
    for i, message in enumerate(messages, 1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            what = "is not an object with the strings role and content"
            raise UserError(f"{where}: message {i} {what}: {str(message)[:60]}")
    return Conversation(str(name), tuple({"role": one["role"], "content": one["content"]} for one in messages))


def _plain(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    ids: list[int] = []
    roles: list[int] = []
    for i, message in enumerate(conversation.messages):
        part = tokenizer(message["content"], add_special_tokens=i == 0, verbose=False).input_ids
        ids += part
        roles += [int(message["role"] == "assistant")] * len(part)
    return ids, roles


def _has_marks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None


def _marked(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    tokens = _render(conversation, conversation.messages, tokenizer, tokenize=True, return_assistant_tokens_mask=True)
    return tokens["input_ids"], tokens["assistant_masks"]


def _compared(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], np.ndarray]:
    text = _render(conversation, conversation.messages, tokenizer, tokenize=False)
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} does not tell where its tokens lie in a text: load the fast tokenizer")
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = tokens["input_ids"]
    begin, end = np.array(tokens["offset_mapping"], np.int64).reshape(-1, 2).T
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = np.zeros(len(ids), np.int8)
    for start, stop in _replies(conversation, text, tokenizer):
        roles[(begin < stop) & (end > start) & (begin < end)] = ASSISTANT
        after = np.flatnonzero(begin >= stop)[:1]  # the token that ends the turn is the assistant's own
        roles[[i for i in after if begin[i] == stop and ids[i] in special]] = ASSISTANT
    return ids, roles


def _replies(conversation: Conversation, text: str, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[int, int]]:
    """Where the replies lie in the rendered text, in characters [start, stop)."""
    stand_in = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)  # private use
    before = 0
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        changed = [*conversation.messages]
        changed[i] = {**message, "content": stand_in}
        other = _render(conversation, changed, tokenizer, tokenize=False)
        start = _shared(text, other)
        stop = len(text) - _shared(text[start:][::-1], other[start:][::-1])
        if start < before or (start == stop and message["content"].strip()):
            raise UserError(
                f"conversation {conversation.id}: the chat template does not show message {i + 1}, a reply, in its place: "
                "leave the conversation out, or mark replies in the template with {% generation %}"
            )
        before = stop
        yield start, stop


def _render(
    conversation: Conversation, messages: Iterable[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> Any:
    from jinja2 import TemplateError

    prompt = conversation.messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template([*map(dict, messages)], add_generation_prompt=prompt, return_dict=True, **options)
    except TemplateError as error:
        raise UserError(f"conversation {conversation.id}: the chat template refuses it: {error}") from None


def _shared(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
