"""Features of texts that a model writes freely: lengths, diversity, entropies, keywords, code, markup, English; no model, no network.

The paper has 61 such columns (Liu et al. 2025, arXiv 2503.03862). `FEATURES` says which of ours are columns of that table: the same formula
for lengths and keyword ratios; the same for `num_tokens`, `unique_tokens` and `ttr` where the tokens are Llama 2's, as they were there; and
`pct_english` by another detector. These depend on how long texts may become: the published ones reach about 2,300 tokens. Not computed:

- 16 `const_parse_*` and 12 `dep_parse_*` columns: a constituency and a dependency parser (Stanza, a neural network with its own weights).
  `num_sentences` and `words_per_sentence` here are close to what two of them count, by regular expressions, so they have other names;
- 12 `domain_*_pct` columns: labels by GPT-4o-mini. `code`, `markup` and `digits` here are shares of characters, which is something else;
- 2 `edu_classifier_*` columns: a neural network with its own weights;
- `entropy_*` and `content_function_ratio_*`: their formulas are not published (the former is one number per model, a "bigram entropy"; the
  latter, at 0.24 to 0.47, is no ratio of content to function words). Ours are `bigram_entropy` and `content_per_function_word`.

A word is a maximal run of letters, digits and underscores, in lower case: "don't" is two. Languages written without spaces have long ones.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
from jaxtyping import Float

from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A number for each text, of which mean and standard deviation over texts are given; or, `pooled`, one for all texts together."""

    name: str
    unit: str
    help: str
    low: float = 0.0
    high: float = np.inf
    pooled: bool = False
    published: bool = False
    """Whether the paper's table has a column of this name and meaning."""


def _keywords(name: str, what: str) -> Feature:
    help = f"{what}; all texts together, whatever the case."
    return Feature(name=f"{name}_ratio", unit="per 100,000 characters", help=help, pooled=True, published=True)


_MATTR_WINDOW = 50
_ENGLISH_BLOCK = 25
_CHUNK = 256  # texts at a time: what is sorted stays in the cache

FEATURES: dict[str, Feature] = {feature.name: feature for feature in (
    Feature(name="char_len", unit="characters", help="Length.", published=True),
    Feature(name="num_tokens", unit="tokens", help="Length in tokens, if a tokenizer is given.", published=True),
    Feature(name="unique_tokens", unit="tokens", help="Distinct tokens, if a tokenizer is given.", published=True),
    Feature(name="ttr", unit="", high=1, help="unique_tokens / num_tokens, if a tokenizer is given.", published=True),
    Feature(name="num_words", unit="words", help="Words."),
    Feature(name="unique_words", unit="words", help="Distinct words."),
    Feature(name="word_ttr", unit="", high=1, help="unique_words / num_words; falls with length."),
    Feature(name="mattr", unit="", high=1, help=f"Mean of word_ttr over all windows of {_MATTR_WINDOW} words (Covington and McFall "
            "2010), of the whole text if it is shorter: does not fall with length."),
    Feature(name="unigram_entropy", unit="bits", help="-sum p(w) log2 p(w) over the text's words w, p(w) = count / num_words."),
    Feature(name="bigram_entropy", unit="bits", help="The same over its num_words - 1 pairs of neighbouring words."),
    Feature(name="repeated_4grams", unit="", high=1, help="1 - distinct / all runs of 4 words (seq-rep-4, Welleck et al. 2020)."),
    Feature(name="num_sentences", unit="sentences", help="Pieces between sentence ends (. ! ? and the like before white space, or a "
            "blank line) that have a word."),
    Feature(name="words_per_sentence", unit="words", help="num_words / num_sentences."),
    Feature(name="content_per_function_word", unit="", help="Words of 2 letters or more that are not English function words, per one "
            "that is; says nothing where the text is not English."),
    Feature(name="pct_english", unit="%", high=100, published=True, help="Words with a letter that stand in English passages: see "
            "`english_words`."),
    Feature(name="code", unit="", high=1, help="Share of characters, indentation aside, in lines that look like code: see "
            "`looks_like_code`."),
    Feature(name="markup", unit="", high=1, help="Share of characters in tags and entities of HTML and XML and in TeX commands."),
    Feature(name="digits", unit="", high=1, help="Share of characters, white space aside, that are 0 to 9."),
    _keywords("question_words", "The words how, what, why and so on"),
    _keywords("imperative_verbs", "The words do, make, use and 19 other verbs, in whatever use"),
    _keywords("conjunctions", "The words and, but, or and six others"),
    _keywords("instructions_words", 'Strings that head a turn, such as "Question:" and "A:", also at the end of a longer word'),
    _keywords("numbers", "Words of decimal digits alone (3.14 has two)"),
)}  # fmt: skip
"""Everything that `text_features` computes, by name."""


def text_features(texts: Sequence[str], tokens: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
    """Return the `FEATURES` of texts: `<name>_mean` and `<name>_std` over the texts that have the feature, or `<name>` if pooled.

    `tokens`, the ids of each text's tokens, add `num_tokens`, `unique_tokens` and `ttr`. A text without words has no ratio to words, and so
    on: such texts are left out. The standard deviation is that of a sample (n - 1). NaN is what no text has, or fewer than two for a
    standard deviation. The order of the texts does not matter, but for rounding.

    >>> found = text_features(["To be, or not to be.", "Why? 42!"])
    >>> found["num_words_mean"], found["word_ttr_mean"], found["unigram_entropy_mean"], found["numbers_ratio"]
    (4.0, 0.833..., 1.459..., 3571.4...)

    A text of 300 words takes 0.25 ms. Raises: `UserError` if there are no texts, `ValueError` if there are not as many of `tokens`.
    """
    if not texts:
        raise UserError("there are no texts: features are means over texts")
    if tokens is not None and len(tokens) != len(texts):
        raise ValueError(f"{len(texts)} texts have {len(tokens)} lists of tokens: they must be as many")
    parts = [_per_text(texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if tokens is not None:
        found |= _of_tokens(tokens)
    result, characters = {}, found["char_len"].sum()
    for name in (name for name in FEATURES if name in found):
        values = found[name][~np.isnan(found[name])]
        if FEATURES[name].pooled:
            result[name] = float(1e5 * values.sum() / characters) if characters else np.nan
        else:
            result[f"{name}_mean"] = float(values.mean()) if len(values) else np.nan
            result[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    return result


def english_words(texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Return for each text the percentage of its words with a letter that stand in English passages; NaN where no word has one.

    Passages are blocks of 25 words (the last takes the rest; a shorter text is one). One is English if 97 % of its letters are a to z, and
    if it has no function word of 40 other languages in Latin script, or more than twice as many English ones. Words that are both, as the
    Dutch and English "of", count as English.

    Measured on blocks of 25 words; the lists were not fitted to them, the rule was chosen among eight. English: 99.4 % of the messages
    in Debian's gettext catalogues, 98.9 % of docstrings, 100 % of licences; of code, 98 % in Python and 96 % in C headers, fewer where it
    is full of tags or numbers. Messages in 97 other languages, equally weighted: 1.9 % (Xhosa 50 %, Scottish Gaelic 30 %, Ganda 15 %,
    Estonian 9 %, each other one 6 % or less). Limits: languages in Latin script without words in the list, text without its accents, lists
    of names.

    >>> english_words(["The cat sat on the mat.", "Die Katze und der Hund.", "1, 2, 3"])
    array([100.,   0.,  nan])
    """
    return _english(_Words(texts))


def looks_like_code(line: str) -> bool:
    """Tell whether a line looks like code by how it ends, how it begins, or an operator in it.

    Measured as the share of characters in the lines found, without comments and docstrings: 93 % of C++ and JavaScript, 91 % of Perl, 83 %
    of Python and C headers; by mistake, 0.5 to 2 % of licences and of messages in five languages. Limits: languages without brackets and
    operators (CMake 46 %, Vim 8 %) and comments are missed; JSON and style sheets count as code; so do the examples within prose.

    >>> [looks_like_code(line) for line in ("for i in range(10):", "x = f(y)", "Wait for it; then go.")]
    [True, True, False]
    """
    line = line.strip()
    return line.endswith(_CODE_END) or bool(_CODE_START.match(line)) or bool(_CODE_OPERATOR.search(line))


class _Words:
    """The words of all texts, one after the other, as numbers in a vocabulary."""

    def __init__(self, texts: Sequence[str]):
        number: defaultdict[str, int] = defaultdict(count().__next__)
        words = [[number[word] for word in _WORD.findall(text.lower())] for text in texts]
        self.vocabulary = list(number)
        self.length = np.array([len(text) for text in words])
        self.word = np.fromiter(chain.from_iterable(words), np.int64, self.length.sum())
        self.text = np.repeat(np.arange(len(texts)), self.length)
        self.place = np.arange(len(self.word)) - np.repeat(np.cumsum(self.length) - self.length, self.length)

    def per_text(self, values: np.ndarray) -> Float[np.ndarray, " texts"]:
        """The sums of one value of each word."""
        return np.bincount(self.text, values, len(self.length)).astype(float)  # of nothing, they are integers

    def each(self, value: Callable[[str], float]) -> Float[np.ndarray, " words"]:
        """A value of each word, computed once for equal words."""
        return np.array([value(word) for word in self.vocabulary], float)[self.word]


def _per_text(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The value of every feature but those of tokens for each text; the counts of the pooled ones."""
    words = _Words(texts)
    found = _of_words(words) | _of_characters(texts)
    found["words_per_sentence"] = _ratio(found["num_words"], found["num_sentences"])
    return found


def _of_words(words: _Words) -> dict[str, np.ndarray]:
    bigrams, of_bigrams = _pairs(words.word, words.text, 1)
    fourgrams, of_fourgrams = _pairs(bigrams, of_bigrams, 2)
    distinct, unigram_entropy = _distinct_and_entropy(words.word, words.text, len(words.length))
    _, bigram_entropy = _distinct_and_entropy(bigrams, of_bigrams, len(words.length))
    distinct_fourgrams, _ = _distinct_and_entropy(fourgrams, of_fourgrams, len(words.length))
    function = words.each(_FUNCTION.__contains__)
    content = (words.each(_letters) >= 2) & (function == 0)
    return {
        "num_words": words.length.astype(float),
        "unique_words": distinct,
        "word_ttr": _ratio(distinct, words.length),
        "mattr": _mattr(words),
        "unigram_entropy": unigram_entropy,
        "bigram_entropy": bigram_entropy,
        "repeated_4grams": 1 - _ratio(distinct_fourgrams, np.bincount(of_fourgrams, minlength=len(words.length))),
        "content_per_function_word": _ratio(words.per_text(content), words.per_text(function)),
        "pct_english": _english(words),
        **{f"{name}_ratio": words.per_text(words.each(listed.__contains__)) for name, listed in _KEYWORDS.items()},
        "numbers_ratio": words.per_text(words.each(str.isdecimal)),
    }


def _of_characters(texts: Sequence[str]) -> dict[str, np.ndarray]:
    points = [np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32) for text in texts]
    lines = [list(filter(None, map(str.strip, text.splitlines()))) for text in texts]
    length = np.array([len(text) for text in texts], float)
    return {
        "char_len": length,
        "num_sentences": np.array([sum(map(bool, map(_WORD.search, _SENTENCE_END.split(text)))) for text in texts], float),
        "code": _ratio(
            [sum(map(len, filter(looks_like_code, text))) for text in lines], [sum(map(len, text)) for text in lines]
        ),
        "markup": _ratio([sum(map(len, _MARKUP.findall(text))) for text in texts], length),
        "digits": _ratio(
            np.array([np.count_nonzero((x >= ord("0")) & (x <= ord("9"))) for x in points]),
            np.array([np.count_nonzero(x > ord(" ")) for x in points]),
        ),
        "instructions_words_ratio": np.array([sum(map(text.lower().count, _TURNS)) for text in texts], float),
    }


def _of_tokens(tokens: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    number = np.array([len(ids) for ids in tokens], float)
    distinct = np.array([len(set(ids)) for ids in tokens], float)
    return {"num_tokens": number, "unique_tokens": distinct, "ttr": _ratio(distinct, number)}


def _english(words: _Words) -> Float[np.ndarray, " texts"]:
    blocks = np.maximum(words.length // _ENGLISH_BLOCK, 1)
    within = np.minimum(words.place // _ENGLISH_BLOCK, blocks[words.text] - 1)
    block = (np.cumsum(blocks) - blocks)[words.text] + within

    def per_block(values: np.ndarray) -> np.ndarray:
        return np.bincount(block, values, blocks.sum())

    letters, latin = words.each(_letters), words.each(_latin_letters)
    own, foreign = per_block(words.each(_FUNCTION.__contains__)), per_block(words.each(_FOREIGN.__contains__))
    plain = per_block(latin) >= 0.97 * per_block(letters)
    english = plain & ((own > 2 * foreign) | (foreign == 0))
    return 100 * _ratio(words.per_text((letters > 0) & english[block]), words.per_text(letters > 0))


def _mattr(words: _Words) -> Float[np.ndarray, " texts"]:
    """Each word is new in the windows that begin after the place where it last was: their number, added up, is that of distinct words."""
    order = np.lexsort([words.word, words.text])
    again = (np.diff(words.word[order]) == 0) & (np.diff(words.text[order]) == 0)
    last = np.full(len(order), -1)
    last[order[1:][again]] = words.place[order[:-1][again]]
    size = np.minimum(words.length, _MATTR_WINDOW)
    windows = words.length - size + 1
    first = np.maximum(last + 1, words.place - size[words.text] + 1)
    new_in = np.minimum(words.place, windows[words.text] - 1) - first + 1
    return _ratio(words.per_text(np.maximum(new_in, 0)), size * windows)


def _pairs(item: np.ndarray, text: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of items at a distance in one text, numbered so that equal pairs have equal numbers, and the text of each."""
    inside = text[distance:] == text[:-distance]
    pairs = item[:-distance] * (item.max(initial=0) + 1) + item[distance:]
    return np.unique(pairs[inside], return_inverse=True)[1], text[distance:][inside]


def _distinct_and_entropy(item: np.ndarray, text: np.ndarray, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Per text, the number of distinct items and the entropy (bits) of their frequencies; NaN without any item."""
    base = item.max(initial=0) + 1
    distinct, counts = np.unique(text * base + item, return_counts=True)
    owner, total = distinct // base, np.bincount(text, minlength=texts)
    mean = _ratio(np.bincount(owner, counts * np.log2(counts), texts), total)
    logarithm = np.log2(total, out=np.full(texts, np.nan), where=total > 0)
    return np.bincount(owner, minlength=texts).astype(float), np.maximum(logarithm - mean, 0)


def _letters(word: str) -> int:
    return len(word) if word.isalpha() else sum(map(str.isalpha, word))


def _latin_letters(word: str) -> int:
    return _letters(word) if word.isascii() else sum("a" <= letter <= "z" for letter in word)


def _ratio(part: Sequence[float] | np.ndarray, whole: Sequence[float] | np.ndarray) -> Float[np.ndarray, " texts"]:
    """Return part / whole, NaN where the whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


_WORD = re.compile(r"\w+")
# Every alternative begins with a few characters and none runs past the next of them: fast, and linear whatever the text.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s|[。！？]|\n\s*\n")
_MARKUP = re.compile(
    r"<(?:/?[A-Za-z][\w:.-]*(?:\s[^<>]*)?/?|[!?][^<>]*)>"  # a tag, comment or declaration
    r"|&(?:[a-zA-Z]+|#\d+|#x[\da-fA-F]+);"
    r"|\\[a-zA-Z]+\*?(?:\{[^{}]*\})?"  # a command of TeX
)

_CODE_END = (";", "{", "[", "(", "),", ");", "):", "},", "],", "});", "])")
_CODE_START = re.compile(
    r"(?:import|from|def|class|return|if|elif|else|for|while|with|try|except|raise|assert|switch|case|function|const|let|var|static"
    r"|public|private|struct|using|namespace|template|my|sub|set)\b(?:.*[:;{(,]|\s+[\w.{*,\"<>]+(?:\s+import\b.*)?|\s*\(.*)?$"
    r"|[)\]}]+[;,:]*(?:\s*else.*)?$"
    r"|\#\s*(?:include|define|if|ifdef|ifndef|endif|undef|pragma)\b|//|/\*|\*/"
    r"|[\w.$@>\[\]'\"-]+[=(].*[,)]$"  # a call, or one argument of a call on a line of its own
)
_CODE_OPERATOR = re.compile(  # == != <= += => -> && || a::b and a = b; the first character alone is fast to look for
    r"[-=!<>+*/|&:](?:(?<!:)=|(?<=[-=])>|(?<=&)&|(?<=\|)\||(?<=\w:):\w|(?<=\S =) \S)"
)


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The lists of words and strings are the definitions of the paper's columns, as the authors' repository gives them.
_KEYWORDS = {
    "question_words": _listed("how what when where which who whose why"),
    "imperative_verbs": _listed(
        "apply build check consider create do ensure find get go keep leave make move put run start stop take try turn use"
    ),
    "conjunctions": _listed("although and because but however or so therefore yet"),
}
_TURNS = ("question:", "answer:", "instruction:", "user:", "assistant:", "q:", "a:")

_FUNCTION = _listed(
    """a about above after again against all also although am among an and another any are as at be because been before being below between
    both but by can cannot could did do does doing during each either else every few for from further had has have having he her here hers
    him himself his how however i if in into is it its itself just me might more most must my myself neither no nor not of off on once one
    only onto or other our ours out over own per same shall she should since so some such than that the their theirs them themselves then
    there these they this those though through thus to too under unless until up upon us very was we were what when where whether which
    while who whom whose why will with within without would yet you your yours"""
)
_FOREIGN = (
    _listed(  # of 40 languages in Latin script, roughly in families
        """de la le les des du une un et est pour dans par pas sur que qui el los las del se es con para por una uno como al os da dos das
    em ao na não il di che non della dei alla sono aquest els amb der die und ist nicht ein eine zu den dem mit von auf für wird
    werden wie het een van voor niet zijn om te met en og ikke til af som kan ei ja eller och att det inte är för av ho ne wes nie
    vir eld nem az egy és hogy nincs je su sa za že się jest dla od nu din cu sau este și pe mai bir ve bu için yang dan tidak untuk
    dengan ini ke dari adalah ang ng mga hindi ay là không các của và một được eta ez ra y ar yn chan gu air nach gus ir ka lai tai
    yra kad iki bez oma kui või pole ole uz nevar jo jao kaj estas të një për nuk dhe ku ya wa kwa tsy ny sy ki li ak bo tha"""
    )
    - _FUNCTION
)
