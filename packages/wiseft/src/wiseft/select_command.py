"""The command `wiseft select`."""

from dataclasses import dataclass
from typing import Any

import tyro

from lmcore.cli import print_table
from wiseft.sampling_options import SamplingCommand


@dataclass(frozen=True, kw_only=True)
class Select(SamplingCommand):
    """Find the early checkpoint, delta and temperature with the best Pass@k, sampling no more than it takes.

    Races each EARLY at each delta and temperature, and LATE alone, on the same problems; who is shown not to be the best leaves. The
    winner is measured again on problems held out. Warns of a loss barrier between LATE and EARLY. Writes result.json and
    index.html to OUT; the same command continues a run that was stopped.
    """

    late: tyro.conf.Positional[str]
    """Folder or Hub id of the late checkpoint."""
    early: tuple[str, ...]
    """Folders or Hub ids of the early checkpoints."""
    k: int
    """Pass@k is what the best candidate has most of."""
    delta: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    """Weights of EARLY to try; 1 is EARLY alone. LATE alone always takes part."""
    temperature: tuple[float, ...] = (0.7, 1.0, 1.3)
    """Temperatures to try."""
    n: int | None = None
    """Samples of each problem, at least k; k by default. More tell more candidates apart where problems are few."""
    block: int = 8
    """Problems a round; after each round candidates may leave."""
    tolerance: float = 0.0
    """Stop when the leader is at most this much worse than any other, e.g. 0.01; 0 never stops for this."""
    holdout: float = 0.25
    """Share of the problems kept for a last, unbiased measurement of the winner and of LATE alone."""
    level: float = 0.95
    """The best candidate is eliminated with probability at most 1 - level; also the level of the intervals."""

    def run(self) -> dict[str, Any]:
        """Select, and return the content of result.json."""
        from wiseft.selection import select

        return select(
            self.late,
            self.early,
            self.read_problems(),
            k=self.k,
            n=self.n,
            delta=self.delta,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            block=self.block,
            tolerance=self.tolerance,
            holdout=self.holdout,
            level=self.level,
            **self.sampling(),
            **self.placement(),
        )

    def show(self, result: dict[str, Any]) -> None:
        """Print what was decided, the tables of the report and what the race cost."""
        from wiseft.selection_report import (
            barrier_rows,
            candidate_rows,
            decision_text,
            held_out_rows,
            held_out_text,
            spent_text,
        )

        print(decision_text(result))
        print_table(candidate_rows(result))
        print(spent_text(result))
        print(held_out_text(result))
        print_table(held_out_rows(result))
        print_table(barrier_rows(result))
        print(f"wrote {self.out / 'index.html'}")
