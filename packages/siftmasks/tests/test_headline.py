import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from lmcore.claims import to_json
from lmcore.errors import UserError
from siftmasks import cli
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


def test_killed_at_two_moments_the_same_command_ends_with_the_values_of_an_uninterrupted_run(smoke, tmp_path):
    """In a process of its own, since it forks: it imports what takes time once, and what it forks is killed."""
    whole, claimed = smoke
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    left = json.loads(run.stdout)
    assert "permuted-0.json" not in left[0], "killed before its longest part was written"
    assert {"permuted-0.json", "store-0.json", "result.json"} <= {*left[1]}, "killed after all of them"
    assert all("claims.json" not in names for names in left)
    result, expected = (json.loads((out / "result.json").read_text()) for out in (tmp_path / "out", whole))
    assert timeless(result["found"]) == timeless(expected["found"])
    claims = json.loads((tmp_path / "out" / "claims.json").read_text())
    uninterrupted = json.loads(json.dumps(to_json("siftmasks", [*claimed.values()], scale="smoke")))
    for one, other in zip(claims.pop("claims"), uninterrupted.pop("claims"), strict=True):
        assert one == other or one["id"] == other["id"] == "time-permuted"
    assert claims == uninterrupted


def timeless(found):
    """Without the times."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key not in ("seconds", "seconds_per_deletion")}
    return [*map(timeless, found)] if isinstance(found, list) else found


def main(out):
    """Run `siftmasks headline` in forks: killed as it is about to name a file, twice, and then to its end; prints what each kill left."""
    from siftmasks import headline_digits, headline_report, headline_store  # noqa: F401 (imported once here, not in every fork)

    torch.set_num_threads(1)
    module.get_context = lambda method: multiprocessing.get_context("fork")  # what is spawned would import everything again
    left = []
    for moment in ("permuted-0.json", "claims.json", None):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            kill_at(moment)
            sys.stdout = sys.stderr
            cli.main(["headline", "--scale", "smoke", "--out", out])
        status = os.waitpid(pid, 0)[1]
        assert status == (0 if moment is None else signal.SIGKILL), status
        left.append(sorted(os.listdir(out)))
    print(json.dumps(left[:2]))


def kill_at(name):
    """Have the processes of this group killed as one of them is about to give a file this name."""

    def hook(event, arguments):
        if event == "os.rename" and os.path.basename(arguments[1]) == name:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main(sys.argv[1])
