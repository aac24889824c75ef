"""Whole tasks in several processes give the store that one process gives, and two processes never write at once."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.sift import sift
from siftmasks.store import Store

SETTINGS = SiftSettings(learning_rate=1e-2, steps=5, batch_size=2)
TASKS = {f"user {n}": [Example(str(i), {"x": n + i, "y": i % 4}) for i in range(5)] for n in range(6)}


def test_one_and_two_processes_give_the_same_store(tmp_path):
    environment = {**os.environ, "LMCORE_BACKEND": "reference"}
    run = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    learned, forgot, refused = (line.split() for line in run.stdout.splitlines())
    assert learned[0] == learned[1]
    assert forgot[0] == forgot[1] != learned[0], "tasks that one process trained, another derives again and forgets"
    assert refused == ["UserError"]


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(33, 4))


def loss(model, examples):
    x = torch.tensor([[(example.fields["x"] * k) % 7 / 7 for k in range(9)] for example in examples])
    return torch.nn.functional.cross_entropy(model(x), torch.tensor([example.fields["y"] for example in examples]))


def train(task):
    base = model()
    return task, sift(base, TASKS[task], SETTINGS, task=task, loss=loss, trainable=list(base.state_dict()))


def forget_in_vain(path):
    try:
        Store.open(path).forget("user 1", TASKS, model=model(), loss=loss)
    except Exception as error:
        return type(error).__name__
    return "forgot"


def main(folder):
    base = model()
    save_file(base.state_dict(), folder / "base.safetensors")
    options = {"settings": SETTINGS, "trainable": list(base.state_dict())}
    one, many = (Store.init(folder / name, folder / "base.safetensors", **options) for name in ("one", "many"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        many._add(pool.imap_unordered(train, reversed(TASKS)))
        one.learn_many(TASKS, model=base, loss=loss)
        print(one.digest(), many.digest())
        for store in (one, many):
            store.forget(["user 0", "user 3"], TASKS, model=base, loss=loss)
        print(one.digest(), many.digest())

        def vectors():
            yield train("user 0")
            print(pool.apply(forget_in_vain, (one.path,)))

        one._add(vectors())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
