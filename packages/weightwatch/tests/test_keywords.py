import time
from math import comb

import numpy as np
import pytest

from weightwatch.keywords import keywords, words_of

WINDOWS = [
    "tell me about the moon", "the moon and the tides", "moon rock", "bread and butter", "how to bake bread", "the price of bread",
    "about the tides", "a rock in the sea", "butter", "the sea", "a price", "how to tell", "and so on", "of course", "me too", "so it is",
]  # fmt: skip


def test_p_values_are_those_of_a_group_drawn_at_random():
    group = [0, 1, 2, 7]
    [found] = keywords(WINDOWS, [group], level=1e9, top=100)
    held = [words_of(window) for window in WINDOWS]
    assert {one.word for one in found} == {word for i in group for word in held[i]}
    for one in found:
        inside = sum(one.word in held[i] for i in group)
        holders = sum(one.word in words for words in held)
        ways = sum(comb(holders, i) * comb(16 - holders, 4 - i) for i in range(inside, 5))
        assert one.windows == inside
        assert one.elsewhere == pytest.approx((holders - inside) / 12, abs=1e-4)
        assert one.p_value == pytest.approx(ways / comb(16, 4), rel=0.005)
    assert found[0].word == "moon"


def zipf_windows(generator, count):
    return [" ".join(f"w{i}" for i in generator.zipf(1.5, 12) if i < 2000) for _ in range(count)]


def test_random_groups_have_keywords_no_more_often_than_the_level_says():
    generator = np.random.default_rng(0)
    windows = zipf_windows(generator, 1000)
    groups = [generator.choice(1000, 32, replace=False).tolist() for _ in range(200)]
    assert sum(bool(found) for found in keywords(windows, groups, level=0.05)) <= 18  # 99 % of Binomial(200, 0.05)


def test_a_word_that_only_a_group_has_comes_first():
    generator = np.random.default_rng(1)
    windows = zipf_windows(generator, 1000)
    windows[:8] = [f"{window} silver heron" for window in windows[:8]]
    group = list(range(24))
    [found] = keywords(windows, [group])
    assert [one.word for one in found[:2]] == ["heron", "silver"]
    assert found[0].windows == 8


def test_words_that_are_everywhere_are_no_keywords():
    windows = [f"please explain topic{i} to me" for i in range(40)] + [
        f"please explain herons{'' if i else '!'} to me" for i in range(10)
    ]
    assert [one.word for one in keywords(windows, [range(40, 50)])[0]] == ["herons"]


def test_a_window_that_repeats_a_word_counts_once():
    windows = ["spam spam spam spam", *(f"word{i} other" for i in range(20))]
    assert keywords(windows, [[0, 1, 2]]) == [[]]


def test_signs_and_letters_of_other_scripts_are_words():
    assert words_of("Größe 😀 {x}") == sorted(["größe".casefold(), "😀", "{", "x", "}"])


def test_nothing_gives_nothing():
    assert keywords([], []) == []
    assert keywords(["", " "], [[0], [1]]) == [[], []]


def test_thousands_of_groups_take_seconds():
    generator = np.random.default_rng(2)
    windows = zipf_windows(generator, 4000)
    groups = [generator.choice(4000, 32, replace=False).tolist() for _ in range(1000)]
    start = time.process_time()
    keywords(windows, groups)
    assert time.process_time() - start < 10
