"""The extremes of many conversations without generating: one forward each, as far as the last watched block."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from weightwatch.batch import UNWATCHED
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.reading import readers
from weightwatch.recording import Peaks
from weightwatch.watching import watch

CHUNK = 128
"""Conversations whose extremes are given together, and which share batches with each other alone."""


def scan(
    model: PreTrainedModel, bank: Bank, conversations: Sequence[TokenizedConversation], *, batch_tokens: int = 4096,
    skip_first: int = 1, start: int = 0, progress: bool = False,
) -> Iterator[tuple[range, Peaks]]:  # fmt: skip
    """Give the extremes of conversations, those from `start` on, `CHUNK` at a time and in order: which of them, and their peaks.

    Neither the language-model head nor the blocks after the last watched one are run; while a chunk is under way the model is without
    them. A batch holds conversations of similar length, padded on the right to at most `batch_tokens` in all (a longer conversation is a
    batch of its own). Batches are made within a chunk, so a chunk gives the same bits wherever it is scanned, on one kind of machine with
    as many threads; in other company, matrix products round differently. For several processes, let each scan some of the chunks.
    """
    with tqdm(total=len(conversations), initial=start, unit="conversation", disable=not progress) as bar:
        for first in range(start, len(conversations), CHUNK):
            chunk = range(first, min(first + CHUNK, len(conversations)))
            yield (
                chunk,
                peaks_of(
                    model, bank, conversations[first : chunk.stop], batch_tokens=batch_tokens, skip_first=skip_first, bar=bar
                ),
            )


def peaks_of(
    model: PreTrainedModel, bank: Bank, conversations: Sequence[TokenizedConversation], *, batch_tokens: int, skip_first: int,
    bar: "tqdm[NoReturn]",
) -> Peaks:  # fmt: skip
    """The peaks of conversations that share batches, in their order; `bar` moves on by one for each."""
    decoder = [*readers(model, bank.blocks[0])][-1]
    options = {"use_cache": False} if "use_cache" in inspect.signature(decoder.forward).parameters else {}
    order = []
    with watch(model, bank, skip_first=skip_first) as watching, _truncated(model, bank.blocks[-1]), torch.no_grad():
        for batch in _batches([len(one.input_ids) for one in conversations], batch_tokens):
            ids, roles = (
                _padded([getattr(conversations[i], name) for i in batch], filler).to(model.device)
                for name, filler in (("input_ids", 0), ("roles", UNWATCHED))
            )
            watching.roles = roles.to(torch.int8)
            decoder(input_ids=ids, attention_mask=(roles != UNWATCHED).long(), **options)
            order += batch
            bar.update(len(batch))
    return Peaks(*(part[np.argsort(order)] for part in watching.peaks()))


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of conversations, the longest first, in batches of at most `batch_tokens` with padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def _padded(rows: Sequence[np.ndarray], filler: int) -> torch.Tensor:
    wide = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for place, row in zip(wide, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(wide)


@contextmanager
def _truncated(model: nn.Module, last: str) -> Iterator[None]:
    """Take the blocks after the one named `last` out of the model for a while."""
    stack, _, number = last.rpartition(".")
    place, _, name = stack.rpartition(".")
    owner = model.get_submodule(place)
    blocks = getattr(owner, name)
    setattr(owner, name, blocks[: int(number) + 1])
    try:
        yield
    finally:
        setattr(owner, name, blocks)
