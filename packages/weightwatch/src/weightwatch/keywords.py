"""The words that set the windows of one group of transcripts apart from all others: no model, no service."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Counts = Int64[np.ndarray, " words"]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")


class Keyword(NamedTuple):
    """A word that is in more windows of a group than chance has."""

    word: str
    windows: int
    """How many windows of the group hold it."""
    elsewhere: float
    """The share of the windows outside of the group that hold it."""
    p_value: float
    """The probability that as many of a random group do; not corrected for the number of words."""


def words_of(text: str) -> list[str]:
    """The distinct words of a text, in lower case and the order of the alphabet; a sign that is no letter or digit is a word too.

    >>> words_of("Don't panic: {'a': 1}, don't!")
    ['!', "'", ',', '1', ':', 'a', "don't", 'panic', '{', '}']
    """
    return sorted({*_WORD.findall(text.casefold())})


def keywords(
    windows: Sequence[str], groups: Sequence[Sequence[int]], *, top: int = 8, level: float = 0.05
) -> list[list[Keyword]]:
    """For each group of windows, the words that are over-represented in it against all windows, by rising p-value.

    Of N windows K hold a word; of n windows drawn from them at random, y or more hold it with probability

        p = Σ_{i >= y} C(K, i) C(N - K, n - i) / C(N, n)        (Fisher's exact test, one-sided)

    A word is listed if p times the number of distinct words is at most `level`: a group drawn at random has any word at all in its list
    with probability at most `level`. The count is of windows, so one that repeats a word does not speak for all. The test is exact:
    log-odds with a Dirichlet prior (Monroe et al. 2008) give the least weight to words that occur nowhere else, like a trigger's.

    `groups` has the places of each group's windows, each once; groups may share windows.

    >>> windows = [f"the {thing} is {i}" for i, thing in enumerate(["silver heron"] * 7 + ["copper falcon", "dog", "cat", "sun"] * 8)]
    >>> [[(one.word, one.windows, one.elsewhere) for one in found] for found in keywords(windows, [range(7), range(7, 14)])]
    [[('heron', 7, 0.0), ('silver', 7, 0.0)], []]
    """
    held = [words_of(window) for window in windows]
    vocabulary = sorted({word for words in held for word in words})
    if not vocabulary or not groups:
        return [[] for _ in groups]
    place = {word: i for i, word in enumerate(vocabulary)}
    in_window = _incidence([[place[word] for word in words] for words in held], len(vocabulary))
    in_group = _incidence(groups, len(windows)) @ in_window  # y, of all groups
    holders = np.asarray(in_window.sum(0))  # K
    found = []
    for number, group in enumerate(groups):
        row = slice(in_group.indptr[number], in_group.indptr[number + 1])
        at, here = in_group.indices[row], in_group.data[row]
        p_values = _p_values(here, holders[at], len(group), len(windows), most=level / len(vocabulary))
        outside = (holders[at] - here) / max(1, len(windows) - len(group))
        order = np.lexsort((at, outside, -here, p_values))
        chosen = order[p_values[order] * len(vocabulary) <= level][:top]
        found.append(
            [Keyword(vocabulary[at[i]], int(here[i]), round(float(outside[i]), 4), float(f"{p_values[i]:.2e}")) for i in chosen]
        )
    return found


def _p_values(here: Counts, holders: Counts, drawn: int, windows: int, *, most: float) -> Float64[np.ndarray, " words"]:
    """P(X >= here); infinity where P(X = here) alone is above `most`, which is ten times faster to find out."""
    from scipy.special import gammaln
    from scipy.stats import hypergeom

    def log_choose(n: Any, k: Any) -> Any:
        return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)

    exactly = log_choose(holders, here) + log_choose(windows - holders, drawn - here) - log_choose(windows, drawn)
    rare = np.flatnonzero(exactly < np.log(most) + 1e-6)  # log-gamma is not exact
    p_values = np.full(len(here), np.inf)
    p_values[rare] = np.minimum(1.0, hypergeom.sf(here[rare] - 1, windows, holders[rare], drawn))
    return p_values


def _incidence(rows: Sequence[Sequence[int]], columns: int) -> "csr_array":
    """A sparse matrix with a 1 in each row at the given columns."""
    from scipy.sparse import csr_array

    ends = np.cumsum([0, *map(len, rows)])
    indices = np.fromiter((i for row in rows for i in row), np.int64, int(ends[-1]))
    return csr_array((np.ones(len(indices), np.int64), indices, ends), shape=(len(rows), columns))
