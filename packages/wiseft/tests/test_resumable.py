"""A run is continued under its own configuration alone, and what it did not write stays."""

import json
import resource

import pytest

from lmcore.errors import UserError
from wiseft.resumable import continued

CONFIG = {"temperature": 1.0, "deltas": (0.1, 0.3)}


def write(folder, data=b"line\n", config=CONFIG, **options):
    """Append to the file of a run, and return what was there before."""
    with continued(folder / "samples.jsonl", config, results=["result.json"], **options) as file:
        before = file.read()
        file.write(data)
    return before


def test_the_same_configuration_goes_on_and_another_is_refused_by_what_differs(tmp_path):
    assert write(tmp_path / "run") == b""
    record = (tmp_path / "run" / "run.json").read_bytes()
    assert write(tmp_path / "run") == b"line\n"
    assert (tmp_path / "run" / "run.json").read_bytes() == record
    with pytest.raises(UserError, match=r"another run \(temperature: 1.0 before, 0.5 now\): .* pass --overwrite"):
        write(tmp_path / "run", config=CONFIG | {"temperature": 0.5})
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == b"line\nline\n"


def test_a_run_that_drew_nothing_gives_way_to_another(tmp_path):
    write(tmp_path, b"")
    assert write(tmp_path, config=CONFIG | {"temperature": 0.5}) == b""
    assert json.loads((tmp_path / "run.json").read_text())["config"]["temperature"] == 0.5


def test_overwriting_empties_the_file_and_deletes_the_results(tmp_path):
    write(tmp_path)
    (tmp_path / "result.json").write_text("of the first run")
    (tmp_path / "notes").write_text("mine")
    assert write(tmp_path, config={}, overwrite=True) == b""
    assert {path.name for path in tmp_path.iterdir()} == {"samples.jsonl", "run.json", "notes"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"samples.jsonl": "{}"}, "samples.jsonl is there, but run.json is missing"),
        ({"result.json": "{}"}, "result.json is there, but run.json is missing"),
        ({"run.json": '{"epochs": 3}'}, "run.json is damaged"),
        ({"run.json": "["}, "run.json is damaged"),
        ({"run.json": '{"file": "counts.jsonl", "config": {}}'}, "run.json is that of a run into counts.jsonl"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path, files, message, overwrite):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        write(tmp_path, overwrite=overwrite)
    assert all((tmp_path / name).read_text() == text for name, text in files.items())


def test_one_process_at_a_time(tmp_path):
    with continued(tmp_path / "samples.jsonl", CONFIG), pytest.raises(UserError, match="another process is writing"):
        write(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/inside", "x" * 300])
def test_a_folder_that_cannot_be_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another --out"):
        write(tmp_path / place)


def test_a_full_disk_is_the_users_to_mend_and_the_run_goes_on_after(tmp_path):
    write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; make room and run the same command again"):
            write(tmp_path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert write(tmp_path).startswith(b"line\n")


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), continued(tmp_path / "samples.jsonl", CONFIG):
        (tmp_path / "elsewhere").read_bytes()
