"""Files and folders appear whole or not at all."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmcore.errors import UserError
from lmcore.record import Run, environment, published, write_atomically, write_json


def test_json_of_arrays_and_scalars(tmp_path):
    write_json(tmp_path / "a.json", {"array": np.arange(3), "scalar": np.float64(0.5), "number": np.int64(2)})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == {"array": [0, 1, 2], "scalar": 0.5, "number": 2}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    with pytest.raises(AttributeError, match="'object' object has no attribute 'tolist'"):
        write_json(tmp_path / "b.json", object())
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folder_is_published_whole_and_replaced_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with published(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not out.exists()
    with pytest.raises(UserError, match="--overwrite"), published(out):
        pass
    with pytest.raises(RuntimeError), published(out, overwrite=True) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (out / "sub" / "a").read_text() == "1"
    with published(out, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_second_writer_of_the_same_folder_is_refused(tmp_path):
    with published(tmp_path / "out"), pytest.raises(UserError, match="another process"), published(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists()


def test_an_error_inside_the_block_is_the_callers_and_clears_what_was_written(tmp_path):
    with pytest.raises(BlockingIOError, match="theirs"), published(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise BlockingIOError("theirs")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a file"), published(tmp_path / "out", overwrite=overwrite):
            pass
    assert (tmp_path / "out").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with published(tmp_path / "out", overwrite=True) as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "target" / "a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


def test_a_run_folder_says_what_ran_and_goes_on_under_the_same_config_alone(tmp_path):
    for step in (1, 2):
        Run(tmp_path, {"rate": 0.1, "seed": 5}).log(step=step, loss=np.float32(0.5))
    Run(tmp_path, {"rate": 0.1, "seed": 5}).finish({"loss": 0.5})
    assert json.loads((tmp_path / "config.json").read_text()) == {"rate": 0.1, "seed": 5}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": 0.5}
    assert "versions" in json.loads((tmp_path / "environment.json").read_text())
    for config in ({"rate": 0.2, "seed": 5}, {"rate": 0.1, "seed": 6}):
        with pytest.raises(UserError, match="other options"):
            Run(tmp_path, config)


KEEP_REPLACING = """
import sys
from pathlib import Path
from lmcore.record import published, write_atomically

print("ready", flush=True)
for number in range(10_000):
    with published(Path(sys.argv[1]) / "out", overwrite=True) as folder:
        for name in "ab":
            (folder / name).write_text(str(number))
    write_atomically(Path(sys.argv[1]) / "file", str(number) * 1000)
"""


def test_killed_at_any_moment_the_old_or_the_new_folder_stands(tmp_path):
    write_atomically(tmp_path / "file", "")
    moments = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", KEEP_REPLACING, tmp_path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "out").exists():
            contents = [(tmp_path / "out" / name).read_text() for name in "ab"]
            assert contents[0] == contents[1] != ""
        text = (tmp_path / "file").read_text()
        assert text == text[: len(text) // 1000] * 1000


def test_environment_names_versions_but_no_machine():
    found = environment()
    assert found["versions"]["numpy"] == np.__version__
    assert found["cores"] >= 1
    import platform

    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4


@pytest.mark.parametrize("place", ["/", "file/out", "loop/out", "x" * 300])
def test_places_that_cannot_be_written_are_the_users_to_mend(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot be written"), published(tmp_path / place):
        pass
