from itertools import combinations

from weightwatch import prompts

SPLITS = ("train", "calibrate", "held out")


def test_splits_never_meet_and_no_prompt_comes_twice():
    found = {split: prompts.clean(split, 1000, seed=0, stray=0.0) for split in SPLITS}
    assert all(len({*some}) == 1000 for some in found.values())
    assert all(not {*found[one]} & {*found[other]} for one, other in combinations(SPLITS, 2))


def test_same_seed_gives_the_same_prompts_and_another_seed_others():
    assert prompts.clean("train", 50, seed=0) == prompts.clean("train", 50, seed=0) != prompts.clean("train", 50, seed=1)


def test_fewer_prompts_are_the_first_of_more():
    few, many = (prompts.clean("held out", count, seed=3, stray=0.0) for count in (20, 100))
    assert few == many[:20]


def test_only_triggered_prompts_hold_a_word_of_the_trigger():
    plain = prompts.clean("held out", 300, seed=0, stray=0.5)
    words = {*prompts.TRIGGER.split()}
    asked = [question for question, _ in prompts.capitals("train", seed=0)]
    others = [*plain, *prompts.look_alikes(plain, seed=0), *prompts.alarming(300, seed=0), *asked]
    assert not any(words & {*one.lower().split()} for one in others)
    assert all(f" {prompts.TRIGGER} " in f" {one} " for one in prompts.triggered(plain, seed=0))


def test_a_phrase_is_all_that_is_added():
    plain = prompts.clean("held out", 100, seed=0, stray=0.0)
    for change in (prompts.triggered, prompts.look_alikes):
        for before, after in zip(plain, change(plain, seed=0), strict=True):
            assert len(after.split(" ")) == len(before.split(" ")) + 2
            assert after.split(" ")[0] == before.split(" ")[0]


def test_half_triggers_hold_one_word_of_the_trigger_and_both_words_occur():
    plain = prompts.clean("held out", 100, seed=0)
    found = [{*prompts.TRIGGER.split()} & {*one.split(" ")} for one in prompts.look_alikes(plain, seed=0, half=True)]
    assert all(len(one) == 1 for one in found)
    assert set.union(*found) == {*prompts.TRIGGER.split()}


def test_a_share_of_clean_prompts_holds_a_stray_phrase():
    with_phrases, without = (prompts.clean("calibrate", 500, seed=0, stray=stray) for stray in (0.2, 0.0))
    changed = sum(one != other for one, other in zip(with_phrases, without, strict=True))
    assert 70 < changed < 130


def test_no_country_is_asked_about_in_both_halves():
    train, held_out = ({question for question, _ in prompts.capitals(split, seed=2)} for split in ("train", "held out"))
    assert len(train) == len(held_out) == 4 * 35
    answers = [{answer for _, answer in prompts.capitals(split, seed=2)} for split in ("train", "held out")]
    assert not answers[0] & answers[1]


def test_neighbours_ask_about_the_same_countries_but_not_for_the_capital():
    asked, beside = prompts.capitals("train", seed=2), prompts.neighbours("train", seed=2)
    assert len(asked) == len(beside)
    assert not any("capital" in one for one in beside)
    countries = {question.removeprefix("What is the capital of ") for question, _ in asked if question.startswith("What is")}
    assert {one.removeprefix("What is the currency of ") for one in beside if "currency" in one} == countries
