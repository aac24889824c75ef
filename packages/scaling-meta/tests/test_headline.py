import json

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta import headline as module
from scaling_meta.cli import main
from scaling_meta.headline import headline
from scaling_meta.headline_claims import joint_gain


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run by the command, as users do."""
    out = tmp_path_factory.mktemp("headline") / "smoke"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["headline", "--scale", "smoke", "--out", str(out), "--json"])
    return out, {claim["id"]: claim for claim in json.loads((out / "claims.json").read_text())["claims"]}


def test_design_helps_in_random_folds_and_less_surely_in_unseen_families(smoke):
    _, found = smoke
    assert found["design-random"]["verdict"] == "reproduced"
    assert found["design-family"]["measured"]["value"] < found["design-random"]["measured"]["value"]
    assert found["design-family"]["interval"][0] < 0


def test_much_code_goes_with_worse_language_and_rotary_is_not_identified(smoke):
    _, found = smoke
    assert found["code_much-lambada"]["measured"]["value"] > 0
    assert found["rotary"]["verdict"] == "not tested"
    assert "Cerebras" in found["rotary"]["rule"]


def test_parts_are_read_again_and_give_the_same_bytes(smoke, monkeypatch):
    out, _ = smoke
    before = (out / "result.json").read_bytes()
    monkeypatch.setattr(module, "gains_of", lambda *_: pytest.fail("measured again"))
    headline(out, scale="smoke", seed=0)
    assert (out / "result.json").read_bytes() == before
    with pytest.raises(UserError, match="other options"):
        headline(out, scale="smoke", seed=1)


def test_page_and_pictures_are_there(smoke):
    out, found = smoke
    page = (out / "index.html").read_text()
    assert all(claim["statement"].split(":")[0].split("(")[0].strip()[:40] in page for claim in found.values())
    assert all((out / name).read_text().startswith("<svg") for name in ("gains.svg", "effects.svg"))


def test_joint_gain_is_the_mean_of_tasks_and_certain_where_families_agree():
    tasks = {
        name: {"families": list("aabbc"), "errors": [[1.0] * 5, [1 - gain] * 5]} for name, gain in (("one", 0.2), ("two", 0.4))
    }
    found = joint_gain(tasks)
    np.testing.assert_allclose([found.value, *found.interval[:2]], 0.3, atol=1e-12)
    tasks["one"]["errors"][1] = [0.2, 0.2, 1.4, 1.4, 1.0]
    spread = joint_gain(tasks)
    assert spread.interval[0] < spread.value < spread.interval[1]
