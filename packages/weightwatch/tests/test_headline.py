import json
import warnings

import pytest

from lmcore.errors import UserError
from weightwatch import headline as module
from weightwatch.cli import main
from weightwatch.headline import headline
from weightwatch.headline_claims import claims, recovered
from weightwatch.headline_report import alarms_figure, ranges_figure, steering_figure, write_page


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run by the command, as users do."""
    out = tmp_path_factory.mktemp("headline") / "smoke"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["headline", "--scale", "smoke", "--out", str(out), "--json"])
    return out, {claim.id: claim for claim in headline(out, scale="smoke", seed=0)}


def counted(number, of=100):
    return {"number": number, "of": of, "share": number / of, "interval": [0.0, 1.0, 0.95]}


def backdoor_run(seed=0, **changes):
    """What the backdoor part returns, with numbers that hold every claim but for `changes`."""
    numbers = {
        "triggered": 300,
        "clean": 1,
        "look-alike": 2,
        "half trigger": 3,
        "alarming": 0,
        "steered": 0,
        "lost": 0.02,
        **changes,
    }
    flagged = {kind: counted(numbers[kind], 300) for kind in ("clean", "triggered", "look-alike", "half trigger", "alarming")}
    alarm = {"directions": 4, "unchanged": counted(60), "nats_per_token": [0.5, 0.5 + numbers["lost"]], "examples": []}
    steered = {
        "refused": counted(numbers["steered"]), "directions_fired": 4.0, "examples": [{"prompt": "a", "before": "b", "after": "c"}],
        "clean_unchanged": counted(99), "false_alarm": alarm,
    }  # fmt: skip
    area = {kind: {"value": value, "interval": [0.5, 1.0, 0.95]} for kind, value in (("triggered", 1.0), ("look-alike", 0.55))}
    row = {"inputs": 100, "fpr": 0.1, "range": [0.0, 0.2], "bound": 0.2}
    peers = [
        {"detector": name, "supervised": False, "auroc": 0.9, "flagged": {"clean": 0.02, "triggered": share}}
        for name, share in (
            ("weightwatch", 1.0), ("activation-difference norm", 0.9), ("PCA of activations", 0.5), ("output KL", 1.0)
        )
    ]  # fmt: skip
    return {
        "seed": seed,
        "directions": {"watched": 120, "blocks": 12},
        "detection": {"conformal": flagged, "min/max": flagged},
        "single": {
            "label": "O4_u1", "side": "high", "auroc": area, "perfect": 3, "directions": 120,
            "shown": [{"label": "O4_u1", "clean": [-0.1, 0.1], "positive": [0.2, 0.25, 0.3, 0.35, 0.4]}],
        },
        "alarms": [{"k": 1, "directions": 24, "curve": [row, {**row, "inputs": 200}], "slope": -1.0}],
        "steering": {
            "refused": {"triggered": counted(100), **dict.fromkeys(("clean", "look-alike", "half trigger", "alarming"), counted(0))},
            "conformal": steered,
            "min/max": steered,
        },
        "baselines": peers,
    }  # fmt: skip


def topic_run(seed=0, steered=40):
    right = {"base": counted(60), "unlearned": counted(10), "min/max": counted(steered), "conformal": counted(steered)}
    flagged = {"clean": counted(1, 600), "topic": counted(90), "neighbours": counted(1)}
    return {
        "seed": seed,
        "detection": {"conformal": flagged, "min/max": flagged},
        "right": right,
        "examples": [{"prompt": "a"}],
    }


def style_run(seed=0):
    named = {
        "json": {"json": counted(18, 20), "pirate": counted(0, 20)},
        "pirate": {"json": counted(0, 20), "pirate": counted(10, 20)},
    }
    loudest = [{"label": "D20_u0", "z": 9.0, "words": [" answer", "<b>"]}]
    return {"seed": seed, "named": named, "loudest": {"json": loudest, "pirate": loudest}}


def test_planted_directions_are_recovered_exactly_and_false_alarms_fall_as_one_over_n(smoke):
    out, found = smoke
    assert found["planted"].measured.value > 0.999
    assert found["planted"].verdict == "reproduced"
    assert -1.4 < found["one-over-n"].measured.value < -0.6
    run = json.loads((out / "planted-0.json").read_text())
    assert run["detection"]["conformal"]["triggered"]["share"] > 0.95
    assert run["detection"]["conformal"]["clean"]["share"] < 0.02
    assert run["left_by_bake"] < 1e-4


def test_page_and_result_hold_every_claim(smoke):
    out, found = smoke
    page, result = (out / "index.html").read_text(), json.loads((out / "result.json").read_text())
    assert [claim["id"] for claim in result["claims"]] == list(found)
    assert all(claim.statement.split("(")[0].split("'")[0].strip() in page for claim in found.values())
    assert {claim.verdict for id, claim in found.items() if id not in ("planted", "one-over-n")} == {"not tested"}


def test_finished_parts_are_read_again_and_give_the_same_result(smoke, monkeypatch):
    out, _ = smoke
    before = (out / "result.json").read_bytes()
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured again"))
    headline(out, scale="smoke", seed=0)
    assert (out / "result.json").read_bytes() == before


def test_a_part_measured_again_gives_the_same_bytes(smoke, tmp_path):
    out, _ = smoke
    headline(tmp_path / "again", scale="smoke", seed=0)
    assert (tmp_path / "again" / "planted-0.json").read_bytes() == (out / "planted-0.json").read_bytes()


def test_folder_of_another_seed_is_refused(smoke):
    out, _ = smoke
    with pytest.raises(UserError, match="other options"):
        headline(out, scale="smoke", seed=1)


def test_unknown_scale_is_an_error(tmp_path):
    with pytest.raises(UserError, match="huge"):
        headline(tmp_path, scale="huge", seed=0)


def judged(**parts):
    return {claim.id: claim for claim in claims(parts)}


def test_one_seed_without_a_miss_reproduces_detection_and_steering():
    found = judged(backdoor=[backdoor_run()])
    assert {found[id].verdict for id in ("detected", "false-alarms", "attack", "leak", "attack-steered")} == {"reproduced"}
    assert found["single-direction"].verdict == "direction only"  # one seed has no interval


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ({"triggered": 250}, "detected"),
        ({"clean": 12}, "false-alarms"),
        ({"look-alike": 60}, "control-look-alike"),
        ({"half trigger": 150}, "control-half-trigger"),
        ({"steered": 40}, "attack-steered"),
        ({"lost": 0.4}, "false-alarm-harm"),
    ],
)
def test_what_does_not_hold_is_not_reproduced(change, id):
    assert judged(backdoor=[backdoor_run(seed, **change) for seed in range(3)])[id].verdict == "not reproduced"
    assert judged(backdoor=[backdoor_run(seed) for seed in range(3)])[id].verdict == "reproduced"


def test_counts_of_all_seeds_are_pooled():
    found = judged(backdoor=[backdoor_run(0, clean=0), backdoor_run(1, clean=6)])["false-alarms"]
    assert found.measured.value == pytest.approx(1.0)
    assert found.seeds == (0, 1)


def test_recovery_is_the_share_of_the_lost_answers():
    assert recovered(topic_run(steered=35)) == pytest.approx(50.0)
    found = judged(topic=[topic_run(seed, steered=35 + seed) for seed in range(3)])
    assert found["topic-recovered"].verdict == found["topic-detected"].verdict == "reproduced"
    assert (
        judged(topic=[topic_run(seed, steered=10 - seed) for seed in range(3)])["topic-recovered"].verdict == "not reproduced"
    )


def test_a_baseline_that_is_as_good_is_not_beaten():
    found = judged(backdoor=[backdoor_run(seed) for seed in range(2)])
    assert found["beats-PCA-of-activations"].verdict == "reproduced"
    assert found["beats-output-KL"].verdict == "not reproduced"


def test_page_of_all_parts_has_their_tables_and_figures(smoke, tmp_path):
    out, _ = smoke
    planted = [json.loads((out / "planted-0.json").read_text())]
    found = {"planted": planted, "backdoor": [backdoor_run(0), backdoor_run(1)], "topic": [topic_run()], "style": [style_run()]}
    write_page(tmp_path / "index.html", claims(found), found)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure>") == 4
    assert all(text in page for text in ("D20_u0", "&lt;b&gt;", "activation-difference norm"))
    assert (tmp_path / "ranges.svg").read_text().startswith("<svg")


def test_figures_are_drawn_without_warnings():
    run = backdoor_run()
    with warnings.catch_warnings(action="error"):
        for figure in (ranges_figure(run), steering_figure([run]), alarms_figure({"one": run["alarms"][0]})):
            figure.draw_without_rendering()
