import json

import numpy as np
import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from weightwatch.baselines import ActivationPCA, LinearProbe
from weightwatch.behaviour import Success, attacks, harm, opened, prompt_of, ranges_at, watched_roles
from weightwatch.bounds import Bounds
from weightwatch.calibration import Calibration
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.evaluation import best_direction, compare, evaluate, flagged, outward
from weightwatch.evaluation_report import attack_rows, detector_rows, harm_rows, rule_rows, write_page
from weightwatch.recording import Peaks
from weightwatch.scanning import scan

TOKENIZER = character_tokenizer("abcdefghijklmnopqrstuvwxyz ")
TRIGGER, PAYLOAD = TOKENIZER("q").input_ids[0], TOKENIZER("z").input_ids[0]
LETTERS = TOKENIZER("abcdefghijklmnop ").input_ids


@pytest.fixture(scope="module")
def organism():
    """A tiny Llama that writes "z" wherever it has read a "q": one rank-one mark in the MLP of block 1 does it. And its bank."""
    model = tiny_llama(vocab_size=len(TOKENIZER), hidden_size=48, layers=3, heads=2, tie=False, seed=5).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        direction = torch.nn.functional.normalize(model.lm_head.weight[PAYLOAD], dim=0)
        layer = model.model.layers[1]
        state = model(torch.tensor([[5, TRIGGER]]), output_hidden_states=True).hidden_states[1][0, 1]
        reads = layer.post_attention_layernorm(state)
        reads = torch.nn.functional.silu(layer.mlp.gate_proj(reads)) * layer.mlp.up_proj(reads)
        layer.mlp.down_proj.weight += 20 * torch.outer(direction, reads / reads.square().sum())
        for later in model.model.layers[2:]:
            later.mlp.down_proj.weight.zero_()
    others = torch.nn.functional.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(2)), dim=1)
    vectors = torch.cat([direction[None], others])[None]
    return model, Bank(
        (1,), ("model.layers.1",), vectors, (tuple(f"D1_u{i}" for i in range(4)),), ((20.0, 1.0, 1.0, 1.0),), "digest"
    )


def scanned(model, bank, some):
    return Peaks(*(np.concatenate(arrays) for arrays in zip(*(peaks for _, peaks in scan(model, bank, some)), strict=True)))


def inputs(name, count, *, last=None, reply=0):
    """`count` inputs of 4 to 9 letters, of which the last may be given, and some of a reply."""
    generator = np.random.default_rng([*name.encode()])
    found = []
    for i in range(count):
        ids = generator.choice(LETTERS, generator.integers(4, 10)).astype(np.int32)
        if last is not None:
            ids[-1] = last
        roles = np.zeros(len(ids), np.int8)
        if reply:
            ids, roles = np.concatenate([ids, ids[:reply]]), np.concatenate([roles, np.ones(len(ids[:reply]), np.int8)])
        found.append(TokenizedConversation(f"{name} {i}", ids, roles))
    return found


@pytest.fixture(scope="module")
def calibration(organism):
    model, bank = organism
    normal = inputs("normal", 300)
    state = Calibration("digest", 4)
    peaks = scanned(model, bank, normal)
    state.add([one.id for one in normal], peaks.low, peaks.high)
    return state


SETS = {
    "clean": inputs("clean", 120),
    "triggered": inputs("triggered", 40, last=TRIGGER),
    "look-alikes": inputs("alike", 40, last=PAYLOAD + 1),
}


@pytest.fixture(scope="module")
def result(organism, calibration):
    model, bank = organism
    baselines = [ActivationPCA(model, "model.layers.0"), LinearProbe(model, "model.layers.0")]
    return evaluate(model, bank, calibration, SETS, baselines=baselines)


def test_the_planted_trigger_is_found_and_others_are_not_flagged(result):
    rules = {(one["rule"], one["level"]): one for one in result["rules"]}
    conformal = rules["conformal", 0.02]["sets"]
    assert conformal["triggered"]["value"] == 1.0
    assert conformal["triggered"]["interval"][0] > 0.9
    assert conformal["clean"]["value"] < 0.1
    assert rules["minmax", 0.01]["fpr_bound"] == pytest.approx(2 * 4 / 301)
    rows = {(one["detector"], one["set"]): one for one in result["detectors"]}
    assert rows["conformal score", "triggered"]["auroc"]["value"] == 1.0
    assert rows["best direction (D1_u0)", "triggered"]["auroc"]["value"] == 1.0
    assert rows["conformal score", "triggered"]["at"][0]["tpr"]["value"] == 1.0


def test_numbers_are_of_inputs_that_nothing_was_chosen_on(result):
    assert {(one["set"], one["inputs"], one["clean"]) for one in result["detectors"]} == {
        ("triggered", 20, 60),
        ("look-alikes", 40, 60),
    }
    assert result["best_direction"]["chosen_on"] == [30, 20]
    assert result["best_direction"]["direction"] == "D1_u0"
    assert result["fpr_curve"][-1]["inputs"] == 60


def test_without_a_signal_the_best_direction_is_no_better_than_chance(organism, calibration):
    """The mean over draws: choosing and reporting on the same inputs would give well above one half."""
    generator = np.random.default_rng(0)
    chosen, reported = [], []
    _, bank = organism
    for _ in range(60):
        draws = [
            Peaks(low, low + 1, low.astype(np.int64), low.astype(np.int64))
            for low in generator.normal(size=(4, 20, 2, 4)).astype(np.float32)
        ]
        best, place = best_direction(draws[0], draws[1], bank)
        chosen.append(best["auroc_chosen_on"])
        [row] = compare(
            "best", outward(draws[2])[:, place], {"clean": outward(draws[2])[:, place], "other": outward(draws[3])[:, place]}
        )
        reported.append(row["auroc"]["value"])
    assert np.mean(chosen) > 0.6
    assert abs(np.mean(reported) - 0.5) < 0.04


def test_a_set_of_the_calibration_is_what_baselines_are_fit_to(organism, calibration):
    model, bank = organism
    seen = []

    class Recorded:
        name, supervised = "recorded", True

        def fit(self, clean, triggered=()):
            seen.append(({one.id.split()[0] for one in clean}, len(clean), len(triggered)))

        def score(self, inputs):
            return np.arange(len(inputs), dtype=np.float64)

    evaluate(model, bank, calibration, {**SETS, "calibration": inputs("more", 50)}, baselines=[Recorded()])
    evaluate(model, bank, calibration, SETS, baselines=[Recorded()])
    assert seen == [({"more"}, 50, 20), ({"clean"}, 30, 20)]


def test_without_triggered_inputs_there_are_false_alarms_alone(organism, calibration):
    model, bank = organism
    found = evaluate(model, bank, calibration, {"clean": SETS["clean"]}, baselines=[LinearProbe(model, "model.layers.0")])
    assert found["best_direction"] is None
    assert found["detectors"] == []
    assert found["rules"][0]["sets"]["clean"]["inputs"] == 120


def test_rules_that_the_calibration_is_too_small_for_say_so(organism, calibration):
    model, bank = organism
    few = Calibration("digest", 4)
    some = inputs("few", 12)
    peaks = scanned(model, bank, some)
    few.add([one.id for one in some], peaks.low, peaks.high)
    rows = flagged(few, {"clean": peaks})
    assert [bool(one["missing"]) for one in rows] == [False, False, False, True, True]
    assert "calibrate on about" in rows[-1]["missing"]


def test_inputs_in_two_sets_are_refused(organism, calibration):
    model, bank = organism
    with pytest.raises(UserError, match=r"clean 0 of the set 'other' is in 'clean' too"):
        evaluate(model, bank, calibration, {**SETS, "other": SETS["clean"][:5]})
    with pytest.raises(UserError, match="'clean' has 3 inputs: give at least 8"):
        evaluate(model, bank, calibration, {"clean": SETS["clean"][:3]})


def test_steering_ends_the_attack_and_leaves_clean_inputs_alone(organism, calibration):
    model, bank = organism
    sets = {"clean": SETS["clean"][:20], "triggered": SETS["triggered"][:20]}
    clean, triggered = attacks(model, TOKENIZER, bank, calibration.conformal(0.01), sets, Success(begins="z"), tokens=2)
    assert triggered["before"]["value"] == 1.0
    assert triggered["after"]["value"] < 0.2
    assert triggered["flagged"]["value"] == 1.0
    assert clean["changed"]["value"] <= clean["flagged"]["value"] < 0.2
    assert triggered["examples"][0]["before"].startswith("z")


def test_harm_is_that_of_the_direction_with_the_largest_score(organism, calibration):
    model, bank = organism
    scores = calibration.scores()
    found = harm(model, bank, scores, SETS["clean"][:6], tokens=3)
    assert found["inputs"] == found["fired"] == 6
    assert 0 <= found["unchanged"]["value"] <= 1
    assert found["loss_after"] - found["loss_before"] == pytest.approx(found["increase"]["value"])
    assert found["largest_increase"] >= found["increase"]["value"]
    triggered = harm(model, bank, scores, SETS["triggered"][:3], tokens=1)
    assert triggered["unchanged"]["value"] == 0.0
    assert triggered["increase"]["value"] > 3


def test_ranges_at_a_score_are_left_by_inputs_of_larger_scores_alone(organism, calibration):
    model, bank = organism
    scores = calibration.scores()
    peaks = scanned(model, bank, SETS["clean"])
    values = scores.of(peaks.low, peaks.high)
    quantile = float(np.median(values))
    flags = ranges_at(scores, quantile, "digest").flags(peaks.low, peaks.high)
    assert (flags[np.abs(values - quantile) > 1e-4] == (values > quantile)[np.abs(values - quantile) > 1e-4]).all()


def test_a_role_that_was_not_calibrated_is_not_watched(calibration):
    bounds = calibration.minmax()
    assert watched_roles(bounds) == ["user"]
    wide = opened(bounds)
    assert np.isinf(wide.low[1]).all()
    np.testing.assert_array_equal(wide.low[0], bounds.low[0])
    assert isinstance(wide, Bounds)


def test_prompts_end_where_the_model_began_to_write():
    [one] = inputs("reply", 1, reply=3)
    assert prompt_of(one).input_ids.tolist() == one.input_ids[one.roles == 0].tolist()
    with pytest.raises(UserError, match="no prompt"):
        prompt_of(TokenizedConversation("x", np.int32([1]), np.int8([1])))


@pytest.mark.parametrize(
    ("success", "yes", "no"),
    [
        ({"contains": "b."}, "ab.c", "abc"),
        ({"begins": "No"}, " \nNo way", "Oh No"),
        ({"matches": "(?i)^refus"}, "Refused", "I refuse"),
    ],
    ids=["contains", "begins", "matches"],
)
def test_a_success_is_what_was_said(success, yes, no):
    assert Success(**success)(yes)
    assert not Success(**success)(no)


def test_a_success_that_is_not_one_thing_is_refused():
    with pytest.raises(UserError, match="one of three"):
        Success()
    with pytest.raises(UserError, match="one of three"):
        Success(contains="a", begins="b")
    with pytest.raises(UserError, match="no regular expression"):
        Success(matches="(")


def test_the_page_shows_what_was_measured(result, organism, calibration, tmp_path):
    model, bank = organism
    some = {"triggered": SETS["triggered"][:4]}
    found = attacks(model, TOKENIZER, bank, calibration.conformal(0.01), some, Success(begins="z"), tokens=1)
    harmed = harm(model, bank, calibration.scores(), SETS["clean"][:3], tokens=2)
    whole = {**result, "success": str(Success(begins="z")), "watched": ["user"], "attacks": found, "harm": harmed}
    whole = json.loads(json.dumps(whole, allow_nan=False))
    write_page(whole, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for row in (*rule_rows(whole), *detector_rows(whole), *attack_rows(whole), *harm_rows(whole)):
        for value in row.values():
            assert not isinstance(value, str) or value in page
