import os
import signal
import subprocess
import sys

import pytest

from lmcore.errors import UserError
from lmcore.record import cached, package_folder

MAKE_SLOWLY = """
import sys, time
from lmcore.record import cached

def make(folder):
    (folder / "first").write_text("1")
    print("half", flush=True)
    time.sleep(float(sys.argv[1]))
    (folder / "second").write_text("2")

print(cached("pair", ["inputs"], make).name)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    return tmp_path


def make_slowly(seconds):
    command = [sys.executable, "-c", MAKE_SLOWLY, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def make_at_once(folder):
    (folder / "first").write_text("1")
    (folder / "second").write_text("2")


def finished(cache):
    return [path for path in cache.glob("pair-*") if path.is_dir()]


def test_a_folder_is_made_once_for_each_value_of_the_inputs(cache):
    made = []
    folders = [cached("pair", inputs, made.append) for inputs in (["a", "bc"], ["ab", "c"], ["a", "bc"])]
    assert folders[0] == folders[2] != folders[1]
    assert len(made) == 2


def test_a_make_that_is_killed_leaves_no_folder_and_the_next_call_makes_it(cache):
    with make_slowly(600) as child:
        assert child.stdout.readline() == "half\n"
        child.send_signal(signal.SIGKILL)
    assert finished(cache) == []
    folder = cached("pair", ["inputs"], make_at_once)
    assert finished(cache) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]


def test_a_make_that_fails_leaves_no_folder(cache):
    def fail(folder):
        (folder / "first").write_text("1")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached("pair", ["inputs"], fail)
    assert finished(cache) == []


def test_of_two_processes_at_once_one_makes_the_folder_and_the_other_waits(cache):
    with make_slowly(0.5) as first, make_slowly(0.5) as second:
        said = sorted([first.stdout.read().split(), second.stdout.read().split()], key=len)
    folder = finished(cache)[0]
    assert said == [[folder.name], ["half", folder.name]]
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached("pair", ["inputs"], make_at_once).parent == tmp_path / "xdg" / "tenfold"


def test_a_package_that_is_not_installed_is_an_error_with_the_command_to_run():
    with pytest.raises(UserError, match="package no_such_package is not installed: pip install this"):
        package_folder("no_such_package", "pip install this")
