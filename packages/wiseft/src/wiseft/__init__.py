"""WiSE-FT for language models: interpolate an early and a late checkpoint, and measure Pass@k, its bias and its variance."""

from typing import TYPE_CHECKING

from lmcore.lazy import attach

if TYPE_CHECKING:
    from wiseft.budget import samples_needed as samples_needed
    from wiseft.callback import WiseCallback as WiseCallback
    from wiseft.comparison import compare as compare
    from wiseft.exact import exact_pass_at_k as exact_pass_at_k
    from wiseft.interpolate import interpolate_ as interpolate_
    from wiseft.merging import merge as merge
    from wiseft.merging import soup as soup
    from wiseft.passk import pass_at_k as pass_at_k
    from wiseft.samples import read_samples as read_samples
    from wiseft.sampling import sample as sample
    from wiseft.selection import select as select
    from wiseft.summary import summarize as summarize
    from wiseft.verification import verify as verify
    from wiseft.votes import best_at_k as best_at_k
    from wiseft.votes import majority_at_k as majority_at_k

_TOPICS = {
    "WiseCallback": "callback",
    "best_at_k": "votes",
    "compare": "comparison",
    "exact_pass_at_k": "exact",
    "interpolate_": "interpolate",
    "majority_at_k": "votes",
    "merge": "merging",
    "pass_at_k": "passk",
    "read_samples": "samples",
    "sample": "sampling",
    "samples_needed": "budget",
    "select": "selection",
    "soup": "merging",
    "summarize": "summary",
    "verify": "verification",
}
__all__ = list(_TOPICS)

attach(__name__, _TOPICS)
