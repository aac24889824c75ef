"""A process that is killed while it learns or forgets leaves the old store or the new one, and what it leaves beside it is cleared."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.store import Store


def test_killed_at_any_moment_the_store_is_the_old_or_the_new(tmp_path):
    """In a process of its own, since it forks: it imports torch once, and what it forks learns, forgets and is killed."""
    environment = {**os.environ, "LMCORE_BACKEND": "reference"}
    run = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == {"learn rederive", "forget rederive", "forget archive"}
    for scenario in found.values():
        assert scenario["old"] + scenario["new"] == 24
        assert scenario["old"] > 5
        assert scenario["new"] > 2, "some were killed after the exchange, before the old version was removed"


class Killed:
    """One operation on a store of two tasks, killed at many moments; each time, what is left is looked at."""

    def __init__(self, folder, operation, policy):
        torch.manual_seed(0)
        self.operation, self.policy, self.place = operation, policy, folder / f"{operation} {policy}"
        self.model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4))
        self.place.mkdir()
        save_file(self.model.state_dict(), self.place / "base.safetensors")
        names = ("alice", "bob", "carol")
        self.data = {name: [Example(str(i), {"x": ord(name[0]) + i, "y": i % 4}) for i in range(4)] for name in names}
        final = ["alice", "bob", "carol"] if operation == "learn" else ["alice"]
        run(lambda: self.make(self.place / "first", ["alice", "bob"]))
        run(lambda: self.make(self.place / "last", final))
        self.old, self.new = (Store.open(self.place / name).digest() for name in ("first", "last"))
        self.work = self.place / "work"
        self.found = {"old": 0, "new": 0}

    def loss(self, model, examples):
        x = torch.tensor([[(example.fields["x"] * k) % 7 / 7 for k in range(9)] for example in examples])
        return torch.nn.functional.cross_entropy(model(x), torch.tensor([example.fields["y"] for example in examples]))

    def make(self, path, tasks):
        settings, names = SiftSettings(learning_rate=1e-2, steps=2), list(self.model.state_dict())
        store = Store.init(path, self.place / "base.safetensors", settings=settings, policy=self.policy, trainable=names)
        store.learn_many({task: self.data[task] for task in tasks}, model=self.model, loss=self.loss)

    def change(self):
        store = Store.open(self.work / "store")
        if self.operation == "learn":
            store.learn("carol", self.data["carol"], model=self.model, loss=self.loss)
        else:
            store.forget("bob", self.data if self.policy == "rederive" else {}, model=self.model, loss=self.loss)

    def fresh(self):
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        shutil.copytree(self.place / "first", self.work / "store")

    def at_events(self, number):
        """Kill at evenly chosen ones of all moments at which a file is opened, linked, renamed or removed."""

        def count():
            seen = at_each_event(lambda number: None)
            self.change()
            (self.place / "events").write_text(str(seen[0]))

        self.fresh()
        run(count)
        events = int((self.place / "events").read_text())
        for step in range(number):
            moment = 1 + step * (events - 1) // (number - 1)

            def killed(moment=moment):
                at_each_event(lambda seen: seen == moment and os.kill(os.getpid(), signal.SIGKILL))
                self.change()

            self.fresh()
            assert os.WTERMSIG(os.waitpid(forked(killed), 0)[1]) == signal.SIGKILL
            self.inspect(f"event {moment} of {events}")

    def at_random(self, number):
        self.fresh()
        start, chance = time.perf_counter(), random.Random(0)
        run(self.change)
        duration = time.perf_counter() - start
        for _ in range(number):
            self.fresh()
            pid, delay = forked(self.change), chance.uniform(0, duration)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.inspect(f"{delay:.3f} s")

    def inspect(self, moment):
        store = Store.open(self.work / "store")
        digest = store.digest()
        assert digest in (self.old, self.new), f"neither old nor new at {moment}"
        store.check()
        assert {path.name for path in self.work.iterdir()} <= {"store", ".store.lock"}, f"remains at {moment}"
        gone = "carol" if digest == self.old else "bob" if self.operation == "forget" else "nobody"
        assert not [path for path in self.work.rglob("*") if gone in path.name], f"a trace of {gone} at {moment}"
        self.found["old" if digest == self.old else "new"] += 1
        if digest == self.old:
            run(self.change)
            assert store.digest() == self.new, f"another result after {moment}"
            store.check()


def at_each_event(act):
    """Call `act(n)` at the n-th file-system event of this process; returns a list that holds n."""
    seen = [0]

    def hook(event, arguments):
        if event == "open" or event.split(".")[0] in ("os", "shutil", "ctypes", "fcntl"):
            seen[0] += 1
            act(seen[0])

    sys.addaudithook(hook)
    return seen


def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return pid


def run(work):
    assert os.waitpid(forked(work), 0)[1] == 0


def main(folder):
    from siftmasks import forgetting, learning  # noqa: F401 (imported once here, not in every fork)

    os.fsync = lambda descriptor: None  # a killed process does not take the system's buffers with it
    torch.set_num_threads(1)
    found = {}
    for operation, policy in (("learn", "rederive"), ("forget", "rederive"), ("forget", "archive")):
        scenario = Killed(folder, operation, policy)
        scenario.at_events(14)
        scenario.at_random(10)
        found[f"{operation} {policy}"] = scenario.found
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
