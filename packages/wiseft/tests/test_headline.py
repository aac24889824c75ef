import dataclasses
import json

import pytest
import torch

from lmcore.errors import UserError
from wiseft import cli
from wiseft import headline as module
from wiseft.headline import SCALES, claims, headline
from wiseft.real_checkpoints import count_misrounded


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, {claim.id: claim for claim in headline(out, scale="smoke", seed=0)}


def test_interpolation_recovers_pass_at_k_with_less_variance_at_equal_bias(smoke):
    _, found = smoke
    assert found["wise-pass-at-64"].measured.value > 1
    assert found["variance-at-equal-bias"].measured.value > 10
    assert found["sft-pass-at-1-rises"].measured.value > 0


def test_page_and_result_hold_every_claim(smoke):
    out, found = smoke
    page = (out / "index.html").read_text()
    result = json.loads((out / "result.json").read_text())
    assert [claim["id"] for claim in result["claims"]] == list(found)
    assert page.count("<figure>") == 5
    assert all(claim.statement.split("(")[0].strip() in page for claim in found.values())
    assert found["merge-real-checkpoints"].verdict == "not tested"


def test_finished_seed_is_read_again_and_gives_the_same_result(smoke, monkeypatch):
    out, _ = smoke
    before = (out / "result.json").read_bytes()
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    headline(out, scale="smoke", seed=0)
    assert (out / "result.json").read_bytes() == before


def test_killed_headline_is_continued_to_the_same_bytes_by_the_same_command_alone(smoke, tmp_path, forks, capsys):
    whole, _ = smoke
    out = tmp_path / "killed"

    def run(*options: str) -> int:
        with pytest.raises(SystemExit) as status:
            cli.main(["headline", *(options or ("--scale", "smoke")), "--out", str(out)])
        return status.value.code

    for moment in (out / "seed-0" / "early" / "model.safetensors", out / "seed-0.json"):
        forks.kill_when(moment.exists, "headline", "--scale", "smoke", "--out", out)
        for other in (("--scale", "smoke", "--seed", "1"), ("--scale", "default")):
            assert run(*other) == 2
            assert "run with other options" in capsys.readouterr().err
    assert not (out / "claims.json").exists()
    assert run() == 0
    places = {"wise/wiseft.json", "wise/README.md"}  # say where the two ends lie
    for path in whole.rglob("*.*"):
        if f"{path.parent.name}/{path.name}" not in places:
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert run() == 2
    assert "holds a finished headline" in capsys.readouterr().err


def test_seed_measured_with_other_settings_is_refused(smoke, tmp_path):
    out, _ = smoke
    found = json.loads((out / "seed-0.json").read_text())
    other = json.dumps(found | {"settings": found["settings"] | {"delta": 0.9}})
    for text in (other, "{}", "{"):
        (tmp_path / "seed-0.json").write_text(text)
        with pytest.raises(UserError, match=r"seed-0\.json was measured with other settings"):
            headline(tmp_path, scale="smoke", seed=0)


def test_start_that_never_gets_there_counts_as_all_the_data_lost(smoke):
    out, _ = smoke
    world = json.loads((out / "seed-0.json").read_text())
    settings = SCALES["smoke"].settings
    world["rl"]["wise"] = [record | {"pass_at_k": [0.0] * 9} for record in world["rl"]["wise"]]
    by_id = {claim.id: claim for claim in claims([world], settings)}
    assert by_id["rl-less-data"].measured.value == -100
    assert by_id["rl-less-data"].verdict == "not reproduced"
    without = {claim.id: claim.verdict for claim in claims([world], dataclasses.replace(settings, rl_steps=0))}
    assert without["rl-less-data"] == without["rl-final-pass-at-1"] == "not tested"


def test_misrounded_weights_are_found_without_rounding_again():
    torch.manual_seed(0)
    early, late = torch.randn(2, 5001).bfloat16().unbind()
    exact = late.double() + 0.3 * (early.double() - late.double())
    rounded = exact.float().bfloat16()  # through float32: right up to double rounding, which none of these values meets
    assert count_misrounded(early, late, rounded, 0.3) == 0
    rounded[7] = torch.nextafter(rounded[7], torch.tensor(torch.inf, dtype=torch.bfloat16))
    assert count_misrounded(early, late, rounded, 0.3) == 1


def test_unknown_scales_and_seeds_out_of_range_are_errors(tmp_path):
    with pytest.raises(UserError, match="huge"):
        headline(tmp_path, scale="huge", seed=0)
    for seed in (-1, 2**32 - 9):
        with pytest.raises(UserError, match=rf"seed is {seed}: it must be in \[0, 2\^32 - 10\]"):
            headline(tmp_path, scale="full", seed=seed)
