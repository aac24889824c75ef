"""Many tasks, several processes, and a store that ends up the same whatever is interrupted, killed or broken."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcore.errors import UserError
from siftmasks import examples, queue
from siftmasks.queue import learn_all
from siftmasks.store import Store
from siftmasks.task_data import TaskData, open_data

from .tiny_tasks import QUICK, SHORT, CommandLine, lines, save_base, write_data, write_jsonl

TASKS = ["alice", "bob", "carol", "dave", "erin", "frank"]

# What a process runs in place of a model: it starts in a moment, and the name of the task says what happens to it.
STAND_IN = """
import os, signal, time
from types import SimpleNamespace
import numpy as np
from lmcore.errors import UserError
from siftmasks.queue import Place

class Quick(Place):
    def trainer(self):
        if self.device == "absent":
            raise UserError("no such device")
        if self.device == "deadly":
            os._exit(3)
        return self.train

    def train(self, task, held):
        if task.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.startswith("wrong"):
            return UserError("the loss is nan")
        if task.startswith("slow"):
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGINT)
        levels = {name: np.full(shape, len(task), np.uint8) for name, (_, shape) in self.config.tensors.items()}
        return SimpleNamespace(levels={name: SimpleNamespace(numpy=lambda own=own: own) for name, own in levels.items()},
                               signs=None, saturated=0)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def quick(tmp_path, monkeypatch, small) -> Store:
    """A store without a model, whose processes run the stand-in."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "quick_place.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("quick_place", None)
    import quick_place

    monkeypatch.setattr(queue, "Place", quick_place.Quick)
    return small.store(max_tasks=20, bits=8)


def named(*tasks: str) -> TaskData:
    return TaskData(Path("data"), {task: [] for task in tasks})


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_killed_in_two_processes_and_resumed_in_one_gives_the_store_of_one_process(capsys, tmp_path, base, unhurried):
    """The real command line with a real model: SIGKILL once a task is published, then the same command goes on."""
    siftmasks, data = CommandLine(capsys), write_data(tmp_path / "data", TASKS)
    for store in ("killed", "whole"):
        siftmasks.result("init", tmp_path / store, "--base", base, "--steps", 60, *SHORT)
    command = ["learn-all", tmp_path / "killed", "--data", data, "--publish-seconds", 0, "--processes", 2]
    code = "import sys; from siftmasks.cli import main; main(sys.argv[1:])"
    with open(tmp_path / "stderr", "w") as stderr:
        run = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=stderr, stdout=subprocess.DEVNULL)
    until(lambda: Store.open(tmp_path / "killed").tasks or run.poll() is not None, 300)
    children = [
        int(process) for task in Path(f"/proc/{run.pid}/task").glob("*/children") for process in task.read_text().split()
    ]
    run.kill()
    run.wait()
    assert run.returncode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    until(lambda: not any(map(alive, children)))
    published = Store.open(tmp_path / "killed").tasks
    assert 0 < len(published) < len(TASKS)

    whole = siftmasks.result("learn-all", tmp_path / "whole", "--data", data)
    assert [*whole["learned"]] == TASKS
    resumed = siftmasks.result(*command[:4])
    assert resumed["skipped"] == published
    assert {*resumed["skipped"], *resumed["learned"]} == {*TASKS}
    assert resumed["digest"] == whole["digest"]
    siftmasks.result("check", tmp_path / "killed")


def test_interrupted_publishes_what_is_trained_and_goes_on(capsys, tmp_path, base, unhurried, monkeypatch):
    module = importlib.import_module("siftmasks.sift")  # the package has a function of that name
    siftmasks, data = CommandLine(capsys), write_data(tmp_path / "data", TASKS)
    siftmasks.result("init", tmp_path / "store", "--base", base, *QUICK)
    whole, ordinary = tmp_path / "whole", module.batches
    siftmasks.result("init", whole, "--base", base, *QUICK)

    def interrupted(examples, settings, task):
        if task == "dave":
            signal.raise_signal(signal.SIGINT)
        return ordinary(examples, settings, task)

    monkeypatch.setattr(module, "batches", interrupted)
    code, out, err = siftmasks("learn-all", tmp_path / "store", "--data", data, "--json")
    assert (code, out) == (130, "")
    assert "run the same command again to go on" in err
    assert Store.open(tmp_path / "store").tasks == ["alice", "bob", "carol"]
    monkeypatch.setattr(module, "batches", ordinary)
    resumed = siftmasks.result("learn-all", tmp_path / "store", "--data", data)
    assert [*resumed["learned"]] == ["dave", "erin", "frank"]
    assert resumed["digest"] == siftmasks.result("learn-all", whole, "--data", data)["digest"]


def test_tasks_that_fail_are_named_and_the_others_learned(capsys, tmp_path, base, unhurried):
    siftmasks, data = CommandLine(capsys), write_data(tmp_path / "data", ["alice", "carol", "erin"])
    (data / "bob.jsonl").write_text("")
    (data / "dave.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    write_jsonl(data / "frank.jsonl", [{"prompt": "a", "completion": "b" * 40}])
    (data / "notes.txt").write_text("not a task")
    siftmasks.result("init", tmp_path / "store", "--base", base, *QUICK)
    error = siftmasks.refused("learn-all", tmp_path / "store", "--data", data)
    assert "3 of 6 tasks were not learned, all others are in the store" in error
    assert "bob.jsonl holds no example" in error
    assert "dave.jsonl, line 2: not JSON" in error
    assert "frank: example" in error
    assert Store.open(tmp_path / "store").tasks == ["alice", "carol", "erin"]


def test_one_file_whose_lines_name_their_tasks_gives_the_store_of_a_folder(capsys, tmp_path, base, unhurried):
    siftmasks = CommandLine(capsys)
    rows = [{"task": task, **line} for number in range(3) for task in TASKS[:2] for line in [lines(task)[number]]]
    file, folder = write_jsonl(tmp_path / "all.jsonl", rows), write_data(tmp_path / "data", TASKS[:2])
    digests = []
    for name, data in (("one", file), ("two", folder)):
        siftmasks.result("init", tmp_path / name, "--base", base, *QUICK)
        digests.append(siftmasks.result("learn-all", tmp_path / name, "--data", data)["digest"])
    assert digests[0] == digests[1]


def test_a_process_that_dies_costs_its_task_alone(quick):
    data = named("a", "bb", "killed", "wrong", "y", "zz")
    result = learn_all(quick, data, processes=2, publish_seconds=0)
    assert {*result["learned"]} == {*quick.tasks} == {"a", "bb", "y", "zz"}
    assert "killed by signal 9" in result["failed"]["killed"]
    assert result["failed"]["wrong"] == "the loss is nan"
    one = Store.open(quick.path).snapshot().ledger("total", "a")
    assert one.unique().tolist() == [1 + 2 + 1 + 2]
    again = learn_all(quick, data, processes=2)
    assert (again["learned"], [*again["failed"]]) == ({}, ["killed", "wrong"])
    assert again["digest"] == result["digest"]


@pytest.mark.parametrize(
    ("device", "message"), [("absent", "no such device"), ("deadly", "loaded the model ended with exit status 3")]
)
def test_processes_that_cannot_start_end_the_run(quick, device, message):
    with pytest.raises(UserError, match=message):
        learn_all(quick, named("a", "b"), processes=2, devices=[device])
    assert quick.tasks == []


def test_processes_end_with_the_one_that_started_them(quick, tmp_path):
    """A task takes a minute: killed with its parent, not when it would next have something to say."""
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "modules")!r})
from pathlib import Path
from siftmasks.store import Store
from siftmasks.queue import _Worker
from quick_place import Quick
if __name__ == "__main__":
    worker = _Worker(Quick(Path("base"), Store.open({str(quick.path)!r}).config, "cpu"))
    worker.receive()
    worker.train("slow", [])
    print(worker.process.pid, flush=True)
    worker.receive()
"""
    (tmp_path / "parent.py").write_text(code)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        os.kill(worker, signal.SIGINT)  # Ctrl-C is for the parent to act on
        time.sleep(0.1)
        assert alive(worker)
        parent.kill()
        until(lambda: not alive(worker), 20)


@pytest.mark.parametrize(("seconds", "tick", "versions"), [(0.0, 0.0, 3), (1e9, 0.0, 1), (0.0, 1.0, 2)])
def test_what_is_trained_is_published_as_often_as_asked_or_as_its_cost_allows(quick, monkeypatch, seconds, tick, versions):
    """On a clock that ticks whenever it is read: publishing that takes a second waits for ten."""
    published, usual, clock = [], Store._add, itertools.count(step=tick)
    monkeypatch.setattr(Store, "_add", lambda self, vectors: published.append(1) or usual(self, vectors))
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=clock.__next__))
    learn_all(quick, named("wrong", "a", "b", "c"), processes=2, publish_seconds=seconds)
    assert len(published) == versions
    assert quick.tasks == ["a", "b", "c"]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_what_is_trained_survives_an_interrupt_while_it_is_published(quick, monkeypatch, done):
    usual, calls = Store._add, []

    def interrupted(self, vectors):
        added = usual(self, vectors) if done or calls else {}
        calls.append(added)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return added

    monkeypatch.setattr(Store, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn_all(quick, named("a", "b", "c"), processes=2, publish_seconds=0)
    assert len(quick.tasks) == 1
    quick.check()


def test_nothing_is_trained_without_room_for_all(quick, monkeypatch):
    monkeypatch.setattr(queue, "_Worker", None)
    with pytest.raises(UserError, match="0 of at most 20 tasks, and 21 more are to be learned"):
        learn_all(quick, named(*map(str, range(21))), processes=2)


def test_nothing_is_trained_for_a_name_that_no_task_can_have(quick, monkeypatch):
    monkeypatch.setattr(queue, "_Worker", None)
    with pytest.raises(UserError, match="more than 200"):
        learn_all(quick, named("a", "b" * 201), processes=2)


def test_folders_and_files_without_tasks_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no TASK\.jsonl file"):
        open_data(tmp_path / "empty")
    with pytest.raises(UserError, match=r"all\.jsonl: No such file"):
        open_data(tmp_path / "all.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"none\.jsonl holds no example"):
        open_data(tmp_path / "none.jsonl")
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match="two files of task 'a'"):
        open_data(tmp_path / "empty")


@pytest.mark.parametrize(
    ("tasks", "only", "message"),
    [
        ([None, None], None, "line 1: names no task"), (["a", None], None, "line 2: names no task"),
        (["a", None], "a", "line 2: names no task"), (["a", 3.5], None, "line 2: task is 3.5"), (["a", ""], None, 'line 2: task is ""'),
    ],
)  # fmt: skip
def test_lines_must_say_whose_they_are(tmp_path, tasks, only, message):
    rows = [line | ({} if task is None else {"task": task}) for task, line in zip(tasks, lines("x"), strict=False)]
    with pytest.raises(UserError, match=message.replace("line", "all.jsonl, line")):
        open_data(write_jsonl(tmp_path / "all.jsonl", rows), only)


def test_a_whole_number_is_a_task_by_its_digits(tmp_path):
    rows = [{"task": task, **line} for task, line in zip([17, "17", 4], lines("x"), strict=True)]
    data = open_data(write_jsonl(tmp_path / "all.jsonl", rows))
    assert {task: len(examples) for task, examples in data.held.items()} == {"17": 2, "4": 1}


def test_each_line_is_parsed_once(tmp_path, monkeypatch):
    parsed, usual = [], examples.orjson
    loads = SimpleNamespace(loads=lambda text: parsed.append(text) or usual.loads(text), JSONDecodeError=usual.JSONDecodeError)
    monkeypatch.setattr(examples, "orjson", loads)
    rows = [{"task": task, **line} for task in "xy" for line in lines(task)]
    open_data(write_jsonl(tmp_path / "all.jsonl", rows)).read("xy")
    assert len(parsed) == len(rows)


def test_ids_are_unique_within_a_task_and_copies_are_counted(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    data = open_data(write_jsonl(tmp_path / "all.jsonl", [{"task": task, **row} for task in ("x", "y", "x")]))
    read = data.read(["x", "y"])
    assert [example.id.partition("-")[2] for example in read["x"]] == ["", "2"]
    assert read["y"][0].id == read["x"][0].id
    rows = [{"task": task, "id": "one", **row} for task in ("x", "y", "x")]
    with pytest.raises(UserError, match="line 3: the id 'one' is that of line 1"):
        open_data(write_jsonl(tmp_path / "all.jsonl", rows))
    with pytest.raises(UserError, match="no data of task 'z': it has those of 2 tasks, 'x', 'y'"):
        data.read(["z"])
