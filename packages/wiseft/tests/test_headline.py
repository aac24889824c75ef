import dataclasses
import json

import pytest
import torch

from lmcore.errors import UserError
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


def test_seed_measured_with_other_settings_is_refused(smoke, tmp_path):
    out, _ = smoke
    found = json.loads((out / "seed-0.json").read_text())
    (tmp_path / "seed-0.json").write_text(json.dumps(found | {"settings": found["settings"] | {"delta": 0.9}}))
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


def test_unknown_scale_is_an_error(tmp_path):
    with pytest.raises(UserError, match="huge"):
        headline(tmp_path, scale="huge", seed=0)
