"""Features have the values of their definitions, stay in their ranges, and take any text."""

import gettext
import math
import random
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.errors import UserError
from scaling_meta.schema import GENERATION
from scaling_meta.text_features import FEATURES, english_words, looks_like_code, text_features

TEXTS = [
    "The cat sat on the mat. Why did it sit there? Because it was tired, and so it sat and sat and sat.",
    'def area(r):\n    return 3.14 * r ** 2\n\nprint(area(2))  # 12.56\nx = [f(i) for i in range(10) if i != 3]\n',
    "Question: What is 7 + 5?\nAnswer: 12. Take 7, then add 5; data: none.",
    "<p>Use <b>this</b> &amp; <a href='x'>that</a></p>",
    "",
]  # fmt: skip


def test_lengths_diversity_and_entropies_are_those_of_their_formulas():
    text = "a b a b c. A b! Yes"
    found = text_features([text])
    words = ["a", "b", "a", "b", "c", "a", "b", "yes"]
    pairs = list(pairwise(words))
    runs = {tuple(words[i : i + 4]) for i in range(5)}

    def entropy(items):
        return -sum(n / len(items) * math.log2(n / len(items)) for n in Counter(items).values())

    expected = {
        "char_len": len(text), "num_words": 8, "unique_words": 4, "word_ttr": 0.5, "mattr": 0.5, "num_sentences": 3,
        "words_per_sentence": 8 / 3, "unigram_entropy": entropy(words), "bigram_entropy": entropy(pairs),
        "repeated_4grams": 1 - len(runs) / 5,
    }  # fmt: skip
    assert {name: found[f"{name}_mean"] for name in expected} == pytest.approx(expected)
    assert math.isnan(found["char_len_std"])


def test_mean_and_sample_standard_deviation_are_over_the_texts_that_have_the_feature():
    found = text_features(["a b", "a b c d", "..."])
    assert (found["num_words_mean"], found["num_words_std"]) == pytest.approx((2, 2))
    assert (found["word_ttr_mean"], found["word_ttr_std"]) == (1, 0)


def test_mattr_is_the_mean_over_all_windows():
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz"[:size], k=length)) for size, length in ((26, 200), (5, 51), (9, 50))
    ]
    for text in texts:
        words = text.split()
        windows = [words[i : i + 50] for i in range(len(words) - 49)]
        assert text_features([text])["mattr_mean"] == pytest.approx(np.mean([len(set(window)) / 50 for window in windows]))


def test_mattr_does_not_fall_with_length_where_the_type_token_ratio_does():
    rng = random.Random(0)
    texts = [" ".join(f"w{int(rng.paretovariate(1)) % 5000}" for _ in range(length)) for length in (100, 3000)]
    short, long = (text_features([text]) for text in texts)
    assert long["word_ttr_mean"] < 0.5 * short["word_ttr_mean"]
    assert long["mattr_mean"] == pytest.approx(short["mattr_mean"], abs=0.05)


def test_features_of_texts_together_are_those_of_each():
    alone = [text_features([text]) for text in TEXTS]
    together = text_features(TEXTS)
    for name, feature in FEATURES.items():
        if not feature.pooled and f"{name}_mean" in together:
            values = [one[f"{name}_mean"] for one in alone if not math.isnan(one[f"{name}_mean"])]
            assert together[f"{name}_mean"] == pytest.approx(np.mean(values)), name


def test_keyword_ratios_are_the_published_formula_over_all_characters():
    rng = random.Random(1)
    pieces = ["How", "whose", "somehow", "Do", "don't", "go_on", "stop", "AND", "but,", "sand", "yet", "7", "7%", "3.14", "x2", "٣",
              "data:", "Q:", "Question:", "user:", "?", "\n", "WHY"]  # fmt: skip
    texts = [" ".join(rng.choices(pieces, k=200)) for _ in range(7)]
    characters = sum(map(len, texts))

    def words(listed):
        return rf"\b(?:{listed.replace(' ', '|')})\b"

    patterns = {
        "question_words_ratio": words("how what why when where who which whose"),
        "conjunctions_ratio": words("and but or so because although however therefore yet"),
        "imperative_verbs_ratio": words("do make consider take use ensure check build apply run create find go try turn start stop put "
                                        "keep leave get move"),
        "instructions_words_ratio": "question:|answer:|instruction:|user:|assistant:|q:|a:",
        "numbers_ratio": r"\b\d+\b",
    }  # fmt: skip
    found = text_features(texts)
    for name, pattern in patterns.items():
        number = sum(len(re.findall(pattern, text, re.IGNORECASE)) for text in texts)
        assert number > 0
        assert found[name] == pytest.approx(1e5 * number / characters), name


def test_tokens_give_the_published_token_columns():
    found = text_features(["ab", "c"], [[1, 1, 2], []])
    assert (found["num_tokens_mean"], found["unique_tokens_mean"], found["ttr_mean"]) == pytest.approx((1.5, 1, 2 / 3))
    assert "ttr_mean" not in text_features(["ab"])
    with pytest.raises(ValueError, match="2 texts have 1 lists of tokens"):
        text_features(["ab", "c"], [[1]])


def test_published_features_are_columns_of_the_database_and_no_other_is():
    found = text_features(["ab"], [[1]])
    for name, feature in FEATURES.items():
        columns = [name] if feature.pooled else [f"{name}_mean", f"{name}_std"]
        assert all((f"gen_{column}" in GENERATION) == feature.published for column in columns), name
        assert all(column in found for column in columns), name


def test_code_markup_and_digits_are_shares_of_characters():
    found = text_features(["see foo\n  x = 12\n"])
    assert found["code_mean"] == 6 / 13
    assert found["digits_mean"] == 2 / 10
    assert text_features(["<b>ab</b> &lt; \\emph{x}"])["markup_mean"] == 19 / 23


@pytest.mark.parametrize(
    "line",
    ["#include <stdio.h>", "int main() {", "}", "  return x;", "for (i = 0; i < n; i++)", "from a import b", "class A(B):", "if x == 1:",
     "a->b", "std::vector<int> v", "} else {", "let x = 3", "self.f(x, y)", "'key': value,", "// why"],
)  # fmt: skip
def test_lines_of_code_look_like_code(line):
    assert looks_like_code(line) == (line != "'key': value,")  # a pair without brackets could be prose


@pytest.mark.parametrize(
    "line",
    ["", "The cat sat on the mat.", "For all we know, it rained.", "if it rains", "He came; she left.", "1. First (see above)",
     "Note: this", "while reading the book", "a - b", "> quoted", "* item", "Return to sender, please.", "It was 3:15."],
)  # fmt: skip
def test_lines_of_prose_do_not_look_like_code(line):
    assert not looks_like_code(line)


LANGUAGES = {
    "German": "Die Kinder spielen im Garten und die Katze liegt auf dem warmen Dach, weil es heute nicht regnet.",
    "French": "Les enfants jouent dans le jardin et le chat dort sur le toit parce que nous avons du soleil.",
    "Spanish": "Los chicos juegan en la casa y el gato duerme al sol porque hoy no hace mucho viento.",
    "Italian": "I bambini giocano in giardino e il gatto dorme sul tetto, ma non piove da molti giorni.",
    "Dutch": "De kinderen spelen in de tuin en de kat slaapt op het dak, want het regent vandaag niet.",
    "Portuguese": "Os meninos jogam na rua e o gato dorme no telhado porque hoje não chove.",
    "Swedish": "Barnen leker i parken och katten sover på taket, men det regnar inte i dag.",
    "Polish": "Dzieci bawią się w ogrodzie, a kot śpi na dachu, bo dzisiaj nie pada deszcz.",
    "Turkish": "Bu bahçede bir kedi ve bir köpek var, ama bugün yağmur için kimse yok.",
    "Indonesian": "Anak yang kecil itu bermain dengan kucing dan tidak pulang dari taman.",
    "Russian": "Дети играют в саду, а кошка спит на крыше.",
    "Greek": "Τα παιδιά παίζουν στον κήπο και η γάτα κοιμάται.",
    "Chinese": "孩子们在花园里玩，猫在屋顶上睡觉。",
    "Japanese": "子供たちは庭で遊び、猫は屋根の上で寝ています。",
    "Arabic": "الأطفال يلعبون في الحديقة والقطة نائمة",
    "Hindi": "बच्चे बगीचे में खेल रहे हैं और बिल्ली सो रही है",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages_are_not_english(language):
    assert english_words([LANGUAGES[language] * 3]) == [0]


def test_english_is_english_also_where_it_stands_beside_another_language():
    english = "The children are playing in the garden and the cat sleeps on the roof because it does not rain today. "
    assert english_words([english]) == [100]
    mixed = english_words([english * 10 + LANGUAGES["German"] * 10])[0]
    assert 40 < mixed < 65


@pytest.mark.skipif(not list(Path("/usr/share/locale").glob("d*/LC_MESSAGES/dpkg.mo")), reason="no message catalogues here")
def test_accuracy_on_the_message_catalogues_of_this_machine():
    english: set[str] = set()
    shares = {}
    for path in sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/dpkg.mo")):
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        translated = {key: text for key, text in messages.items() if isinstance(key, str) and key and text != key}
        if len(translated) >= 50 and not path.parts[4].startswith("en"):
            english |= translated.keys()
            shares[path.parts[4]] = english_words([" ".join(translated.values())])[0]
    assert len(shares) >= 15
    assert english_words([" ".join(sorted(english))])[0] > 97
    assert np.mean(list(shares.values())) < 4, shares


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(TEXTS)
WORDS = st.lists(st.sampled_from(["the", "cat", "и", "x = 1;\n", "3", "!", "\n\n", "<b>", "😀", "don't"]), max_size=120).map(
    " ".join
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT | WORDS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_feature_is_in_its_range_whatever_the_texts_and_their_order(texts, rng):
    found = text_features(texts)
    for name, feature in FEATURES.items():
        for value in (found.get(f"{name}_mean", math.nan), found.get(name, math.nan)):
            assert math.isnan(value) or feature.low <= value <= feature.high + 1e-9, name
        assert not found.get(f"{name}_std", 0) < 0
    shuffled = rng.sample(texts, len(texts))
    assert text_features(shuffled) == pytest.approx(found, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(WORDS, st.integers(2, 5))
def test_a_text_given_again_changes_no_mean(text, times):
    once, again = text_features([text]), text_features([text] * times)
    for name, value in once.items():
        if not name.endswith("_std"):
            assert again[name] == pytest.approx(value, nan_ok=True), name


@pytest.mark.parametrize("text", ["", " ", "\n\n", "a", "7", "😀", "👩‍👩‍👧", "\x00", "\ud800", "...", "İ"], ids=ascii)
def test_the_smallest_texts_have_features(text):
    found = text_features([text])
    assert found["char_len_mean"] == len(text)
    assert found["num_words_mean"] == (text in ("a", "7")) + (text == "İ") * found["num_words_mean"]
    assert math.isnan(found["word_ttr_mean"]) == (found["num_words_mean"] == 0)


PIECES = ["word ", "a", ".", "<", "<!--", "<a ", "\\a{", "(", "\n", '"', "a(", "= ", "😀", ") ", "&", "a:"]


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_a_very_long_text_takes_time_in_proportion(piece):
    text_features([piece * 10])
    start = time.process_time()
    found = text_features([piece * (300_000 // len(piece))])
    assert found["char_len_mean"] > 290_000
    assert time.process_time() - start < 2


def test_ten_thousand_texts_take_seconds():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(words, k=300)) for _ in range(500)]
    start = time.process_time()
    text_features(texts)
    assert (time.process_time() - start) / len(texts) * 10_000 < 20  # 2.5 s on an idle core


def test_no_texts_are_refused():
    with pytest.raises(UserError, match="there are no texts"):
        text_features([])
