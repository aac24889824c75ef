"""Inputs that a model reads together, and the role and position of each of their tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int8, Int64
from torch import Tensor

from weightwatch.conversations import ASSISTANT, USER

UNWATCHED = -1
"""The role of padding, of the first tokens of an input and of what stands in a row after its end."""


@dataclass(frozen=True)
class Rule:
    """What tells roles and ends of rows."""

    prompt: int | None = None
    """Columns up to where the model writes; None where that has to be guessed."""
    ends: tuple[int, ...] = ()
    """Tokens of the model's with which a row ends; without any, none does before the others."""
    padding: int | None = None
    """What a row that has ended, perhaps by a rule that is not known here, is filled with."""
    given: Int8[Tensor, "rows given"] | None = None
    """The caller's roles, of the columns from `given_from` on."""
    given_from: int = 0

    def roles(self, start: int, columns: int) -> list[int]:
        """The roles of the columns of a forward, but for those that were given."""
        if self.prompt is not None:
            written = min(max(start + columns - self.prompt, 0), columns)
            return [USER] * (columns - written) + [ASSISTANT] * written
        written = self.given is not None or (start > 0 and columns == 1)
        return [ASSISTANT if written else USER] * columns


class _Span(NamedTuple):
    start: int
    ids: Tensor  # -1: not known
    roles: Tensor
    positions: Tensor


class Batch:
    """Inputs that are read together, one per row, from their first token to their last.

    Forwards are noted as they come; roles and positions of many are worked out together, when somebody asks for them.
    """

    def __init__(self, first: int, rows: int, device: torch.device, skip_first: int):
        self.first = first
        """The number of the first row among all inputs."""
        self.rows = rows
        self.columns = 0
        """Read so far, padding included."""
        self.rule = Rule()
        self._skip_first = skip_first
        self._noted: list[tuple[Tensor | None, Tensor | None, list[int]]] = []  # ids, what is no padding (None: all), roles
        self._spans: list[_Span] = []
        self._tokens: Int64[Tensor, " rows"] = torch.zeros(
            rows, dtype=torch.int64, device=device
        )  # without padding, worked out
        self._ended: Bool[Tensor, " rows"] = torch.zeros(rows, dtype=torch.bool, device=device)

    def begin_after(self, columns: int, real: Tensor | None) -> None:
        """Begin with inputs of which so many columns were read unwatched."""
        self.columns = columns
        self._tokens = self._tokens + (columns if real is None else (real != 0).sum(1))

    def follow(self, rule: Rule) -> None:
        """Read by another rule from here on; rows that had ended go on."""
        self._work_out()
        self.rule, self._ended = rule, torch.zeros_like(self._ended)

    def note(self, ids: Tensor | None, real: Tensor | None, columns: int) -> None:
        """Take in the columns of a forward."""
        self._noted.append((ids, real, self.rule.roles(self.columns, columns)))
        self.columns += columns

    def span(self, start: int, stop: int) -> tuple[Int8[Tensor, "rows columns"], Int64[Tensor, "rows columns"]]:
        """Role (or `UNWATCHED`) and position in its input (-1: padding) of every token in these columns."""
        self._work_out()
        parts = []
        for one in reversed(self._spans):  # what is asked for is at the end
            if one.start < stop:
                parts.append([part[:, max(0, start - one.start) : stop - one.start] for part in (one.roles, one.positions)])
            if one.start <= start:
                break
        roles, positions = (torch.cat(part, 1) for part in zip(*reversed(parts), strict=True))
        return roles, positions

    def token_ids(self, row: int) -> dict[int, int]:
        """The token id at each position of an input, where the model was given ids."""
        self._work_out()
        pairs = (zip(one.positions[row].tolist(), one.ids[row].tolist(), strict=True) for one in self._spans)
        return {position: token for some in pairs for position, token in some if position >= 0 and token >= 0}

    def _work_out(self) -> None:
        noted, self._noted = self._noted, []
        if not noted:
            return
        rows, device, rule = self.rows, self._tokens.device, self.rule
        columns = [len(roles) for _, _, roles in noted]
        start, stop = self.columns - sum(columns), self.columns
        ids = torch.cat(
            [ids if ids is not None else _full(rows, n, -1, device) for (ids, _, _), n in zip(noted, columns, strict=True)], 1
        )
        if all(real is None for _, real, _ in noted):
            positions = self._tokens[:, None] + torch.arange(stop - start, device=device)
            self._tokens = self._tokens + (stop - start)
        else:
            real = (
                torch.cat(
                    [
                        real if real is not None else _full(rows, n, 1, device)
                        for (_, real, _), n in zip(noted, columns, strict=True)
                    ],
                    1,
                )
                != 0
            )
            positions = torch.where(real, self._tokens[:, None] + real.cumsum(1) - 1, -1)
            self._tokens = self._tokens + real.sum(1)
        roles = torch.tensor([role for _, _, roles in noted for role in roles], dtype=torch.int8, device=device).expand(
            rows, -1
        )
        if rule.given is not None:
            given = rule.given[:, start - rule.given_from : stop - rule.given_from]
            roles = torch.cat([given, roles[:, given.shape[1] :]], 1)
        if rule.ends and rule.prompt is not None:
            roles = self._without_ends(roles, ids, start + torch.arange(stop - start, device=device) >= rule.prompt)
        self._spans.append(_Span(start, ids, roles.masked_fill(positions < self._skip_first, UNWATCHED), positions))

    def _without_ends(self, roles: Tensor, ids: Tensor, wrote: Tensor) -> Tensor:
        end = torch.isin(ids, torch.tensor(self.rule.ends, device=ids.device)) & wrote
        over = self._ended[:, None] | (end.cumsum(1) > 0)
        self._ended = over[:, -1]
        if self.rule.padding is not None:
            over = over | (wrote & (ids == self.rule.padding))
        return roles.masked_fill(over, UNWATCHED)


def _full(rows: int, columns: int, value: int, device: torch.device) -> Tensor:
    return torch.full((rows, columns), value, device=device)
