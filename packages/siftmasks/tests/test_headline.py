import json
from dataclasses import asdict

import pytest

from lmcore.errors import UserError
from siftmasks import headline as module
from siftmasks.headline import headline
from siftmasks.headline_claims import claims
from siftmasks.headline_report import deletion_figure, merging_figure


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, {claim.id: claim for claim in headline(out, scale="smoke", seed=0)}


def test_masks_recover_what_naive_merging_loses_and_the_store_forgets_exactly(smoke):
    _, found = smoke
    assert found["masks-permuted"].measured.value > 10
    assert found["sign-constraint-permuted"].measured.value > 0
    assert found["exact"].measured.value == 0
    assert found["exact"].verdict == found["fewer-steps"].verdict == "reproduced"


def test_page_and_result_hold_every_claim(smoke):
    out, found = smoke
    page, result = (out / "index.html").read_text(), json.loads((out / "result.json").read_text())
    assert [claim["id"] for claim in result["claims"]] == list(found)
    assert page.count("<figure>") == 3
    assert (out / "merging.svg").read_text().startswith("<svg")
    assert all(claim.statement.split("(")[0].split("'")[0].strip() in page for claim in found.values())
    assert found["masks-rotated"].verdict == "not tested"


def test_finished_parts_are_read_again_and_give_the_same_result(smoke, monkeypatch):
    out, _ = smoke
    before = (out / "result.json").read_bytes()
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured again"))
    headline(out, scale="smoke", seed=0)
    assert (out / "result.json").read_bytes() == before


def test_part_measured_with_other_settings_is_refused(smoke, tmp_path):
    out, _ = smoke
    found = json.loads((out / "permuted-0.json").read_text())
    found["job"]["options"]["counts"] = [1, 9]
    (tmp_path / "permuted-0.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"permuted-0\.json was measured with other settings"):
        headline(tmp_path, scale="smoke", seed=0)


def test_a_ledger_that_differs_after_the_sweep_is_not_exact(smoke):
    out, _ = smoke
    parts = {name: [json.loads((out / f"{name}-0.json").read_text())["found"]] for name in ("permuted", "store")}
    parts["permuted"][0]["deletion"]["differing"] = 1
    by_id = {claim.id: claim for claim in claims(parts)}
    assert by_id["exact"].verdict == "not reproduced"
    assert asdict(by_id["exact"])["measured"]["value"] == 1


def test_figures_have_a_panel_for_each_setting(smoke):
    out, _ = smoke
    one = json.loads((out / "permuted-0.json").read_text())["found"]
    found = {"permuted": [one], "rotated": [one], "private": [one], "shared": [one]}
    assert len(merging_figure(found).axes) == len(deletion_figure(found).axes) == 4


def test_unknown_scale_is_an_error(tmp_path):
    with pytest.raises(UserError, match="huge"):
        headline(tmp_path, scale="huge", seed=0)
