"""What drives each direction to its extremes over a corpus: transcripts, keywords, words and labels (WeightWatch, section 5)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from weightwatch.conversations import ROLES, TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.events import SIDES
from weightwatch.keywords import Keyword, keywords
from weightwatch.labelling import Question
from weightwatch.top_tokens import TopTokens

if TYPE_CHECKING:
    from weightwatch.lens import Words

CHARACTERS = 240
"""A transcript is shown from so many characters before its firing token."""
ALIKE = 0.8
"""Transcripts with a larger Jaccard similarity are near-duplicates."""
_SHINGLE = 5  # characters
_TOKENS = 96  # in front of the firing token, of which the last CHARACTERS are shown


@dataclass(frozen=True)
class Transcript:
    """An input up to the token that drives the direction furthest in it."""

    rank: int
    """From 1, among all inputs of the corpus, near-duplicates included."""
    id: str
    cosine: float
    position: int
    """Of the token in the input, from 0."""
    before: str
    """The text in front of the token, its last part."""
    token: str
    cut: bool
    """Whether the text in front is longer than `before`."""

    @property
    def text(self) -> str:
        """The text up to the token, itself included."""
        return self.before + self.token


@dataclass(frozen=True)
class End:
    """One end of a direction in one role."""

    role: str
    side: str
    """`low` or `high`."""
    inputs: int
    """How many have the role."""
    first_bin: int
    """The bins of the histogram from this one on, of `top_tokens.BINS` from -1 to 1."""
    histogram: tuple[int, ...]
    transcripts: tuple[Transcript, ...]
    keywords: tuple[Keyword, ...]
    duplicates: int
    """Near-duplicates among the top inputs, which are left out."""
    label: str | None = None


@dataclass(frozen=True)
class AuditedDirection:
    """A direction with what drives it and what it writes."""

    label: str
    layer: int
    sigma: float
    raises: tuple[tuple[str, float], ...]
    """Tokens that it makes likelier, with z-scores (`lens.words`)."""
    lowers: tuple[tuple[str, float], ...]
    ends: tuple[End, ...]

    @property
    def range(self) -> float:
        """The greatest cosine less the least, over roles."""
        cosines = [one.cosine for end in self.ends for one in end.transcripts]
        return max(cosines) - min(cosines) if cosines else 0.0


@dataclass(frozen=True)
class Audit:
    """An audit of all watched directions."""

    directions: tuple[AuditedDirection, ...]
    inputs: int
    facts: Mapping[str, Any]
    """Where it comes from: names of models and data, digests, options."""

    def questions(self) -> list[Question]:
        """What to ask an endpoint: one question per end with transcripts."""
        return [
            Question(f"{one.label} {end.role} {end.side}", tuple((text.before, text.token) for text in end.transcripts))
            for one in self.directions
            for end in one.ends
            if end.transcripts
        ]

    def labelled(self, labels: Mapping[str, str]) -> "Audit":
        """The audit with labels by the names of `questions`."""
        return replace(
            self,
            directions=tuple(
                replace(
                    one,
                    ends=tuple(replace(end, label=labels.get(f"{one.label} {end.role} {end.side}")) for end in one.ends),
                )
                for one in self.directions
            ),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        rows = [{**asdict(one), "range": one.range} for one in self.directions]
        for row in rows:
            for end in row["ends"]:
                end["keywords"] = [one._asdict() for one in end["keywords"]]
        return {**self.facts, "inputs": self.inputs, "directions": rows}


def describe(
    tokens: TopTokens, bank: Bank, conversations: Sequence[TokenizedConversation], tokenizer: PreTrainedTokenizerBase, *,
    words: Sequence["Words"] = (), shown: int = 10, facts: Mapping[str, Any] | None = None,
) -> Audit:  # fmt: skip
    """Read the top tokens: the transcripts of both ends of each direction, near-duplicates dropped, and their keywords.

    Of each end's top inputs, by rank, one is left out if the Jaccard similarity of its text to a better one's is above `ALIKE` (5-character
    shingles of the last `CHARACTERS` characters up to the firing token, in lower case with single spaces). The first `shown` of those that
    stay are listed with their ranks; keywords are of all that stay, against those of all ends in the same role.

    `words` are those of the bank's directions in its order, if any.
    """
    at = [(role, direction, side) for direction in range(sum(bank.counts)) for role in range(len(ROLES)) for side in range(2)]
    reader = _Reader(conversations, tokenizer)
    kept = {place: _distinct(tokens, place, reader) for place in at}
    found = {place: words for role in range(len(ROLES)) for place, words in _keywords(kept, role).items()}
    ends = {place: _end(tokens, place, kept[place], found[place], shown) for place in at}
    audited = []
    number = 0
    for layer, labels, sigmas in zip(bank.layers, bank.labels, bank.sigma, strict=True):
        for label, sigma in zip(labels, sigmas, strict=True):
            mine = tuple(
                ends[role, number, side] for role in range(len(ROLES)) for side in range(2) if tokens.inputs_with_role[role]
            )
            written = (words[number].high, words[number].low) if words else ((), ())
            audited.append(AuditedDirection(label, layer, sigma, *written, mine))
            number += 1
    return Audit(tuple(audited), tokens.inputs, dict(facts or {}))


def distinct(conversations: Sequence[TokenizedConversation]) -> list[TokenizedConversation]:
    """The conversations without those whose tokens and roles are all those of an earlier one.

    >>> one, two = (TokenizedConversation(name, np.int32([1, 2]), np.int8([0, 0])) for name in "ab")
    >>> [kept.id for kept in distinct([one, two])]
    ['a']
    """
    first: dict[bytes, TokenizedConversation] = {}
    for one in conversations:
        first.setdefault(hashlib.blake2b(one.input_ids.tobytes() + one.roles.tobytes(), digest_size=16).digest(), one)
    return [*first.values()]


class _Reader:
    """The texts of tokens in conversations, each decoded once."""

    def __init__(self, conversations: Sequence[TokenizedConversation], tokenizer: PreTrainedTokenizerBase):
        self.conversations, self._tokenizer = conversations, tokenizer
        self._texts: dict[tuple[int, int], tuple[str, str, bool]] = {}

    def text(self, number: int, position: int) -> tuple[str, str, bool]:
        """What stands before the token (its last part), the token, and whether the text was cut."""
        if (number, position) not in self._texts:
            ids = self.conversations[number].input_ids[: position + 1].tolist()
            start = max(0, position - _TOKENS)
            whole, before = (str(self._tokenizer.decode(part)) for part in (ids[start:], ids[start:-1]))
            same = len(before)
            while not whole.startswith(before[:same]):  # part of a character decodes to another one than all of it
                same -= 1
            before, token = whole[:same], whole[same:]
            cut = start > 0 or len(before) > CHARACTERS
            self._texts[number, position] = before[-CHARACTERS:], token, cut
        return self._texts[number, position]


def _distinct(tokens: TopTokens, place: tuple[int, int, int], reader: _Reader) -> list[Transcript]:
    kept: list[Transcript] = []
    shingles: list[frozenset[str]] = []
    for rank, (outward, number, position) in enumerate(
        zip(tokens.outward[place].tolist(), tokens.input[place].tolist(), tokens.position[place].tolist(), strict=True), 1
    ):
        if number < 0:
            break
        before, token, cut = reader.text(number, position)
        mine = _shingles(before + token)
        if not any(_jaccard(mine, other) > ALIKE for other in shingles):
            cosine = outward if place[2] else -outward
            kept.append(Transcript(rank, reader.conversations[number].id, round(cosine, 6), position, before, token, cut))
            shingles.append(mine)
    return kept


def _shingles(text: str) -> frozenset[str]:
    plain = " ".join(text.casefold().split())
    return frozenset(plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def _keywords(
    kept: Mapping[tuple[int, int, int], Sequence[Transcript]], role: int
) -> dict[tuple[int, int, int], list[Keyword]]:
    """The keywords of the ends in a role."""
    places = [place for place in kept if place[0] == role]
    number: dict[tuple[str, int], int] = {}  # of the window that ends at a token of a conversation
    windows: list[str] = []
    for place in places:
        for one in kept[place]:
            if number.setdefault((one.id, one.position), len(windows)) == len(windows):
                windows.append(one.text)
    groups = [[number[one.id, one.position] for one in kept[place]] for place in places]
    return dict(zip(places, keywords(windows, groups), strict=True))


def _end(
    tokens: TopTokens, place: tuple[int, int, int], kept: Sequence[Transcript], found: Sequence[Keyword], shown: int
) -> End:
    role, _, side = place
    counts = tokens.histogram[place]
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, -1)
    duplicates = int((tokens.input[place] >= 0).sum()) - len(kept)
    return End(
        ROLES[role], SIDES[side], int(tokens.inputs_with_role[role]), first, tuple(counts[first : last + 1].tolist()),
        tuple(kept[:shown]), tuple(found), duplicates,
    )  # fmt: skip
