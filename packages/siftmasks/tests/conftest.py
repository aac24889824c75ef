"""What the tests of the store share: a small base, random task vectors, and a real model with data to train on."""

from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.models import tiny_llama
from siftmasks.bits import pack_bits
from siftmasks.config import StoreConfig
from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.store import Store
from siftmasks.task_vector import TaskVector


def random_vector(config: StoreConfig, seed: int) -> TaskVector:
    """Levels of which half are 0 and some the largest, as `sift` makes them."""
    random, grid = np.random.default_rng(seed), config.settings.grid
    levels, signs = {}, {}
    for name, (_, shape) in config.tensors.items():
        numbers = random.integers(0, grid.largest + 1, shape) * random.integers(0, 2, shape)
        levels[name] = torch.from_numpy(numbers).to(grid.level_dtype)
        signs[name] = pack_bits(torch.from_numpy(random.integers(0, 2, shape) > 0))
    return TaskVector(levels, signs if config.settings.mode == "signs" else None, 0)


def contents(folder: Path, canonical: bool = False) -> dict[str, bytes]:
    """Every file of a folder with its bytes; of a store, only the files that are part of its digest if `canonical`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outside = ("sidecar/", "archive/", "base.json") if canonical else ()
    return {name: data for name, data in files.items() if not name.startswith(outside or "\0")}


@dataclass(frozen=True)
class Small:
    """Stores over a base of three tensors, one frozen, without a model: task vectors come from `random_vector`."""

    folder: Path

    @property
    def base(self) -> Path:
        path = self.folder / "base.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            save_file({"a": torch.randn(5, 7), "b": torch.randn(13).bfloat16(), "frozen": torch.randn(3)}, path)
        return path

    def store(self, name: str = "store", tasks: str = "", **options) -> Store:
        settings = SiftSettings(**{key: options.pop(key) for key in ("mode", "bits", "density") if key in options})
        options = {"max_tasks": 9, "policy": "archive", "trainable": ["a", "b"]} | options
        store = Store.init(self.folder / name, self.base, settings=settings, **options)
        if tasks:
            store._add((task, random_vector(store.config, ord(task))) for task in tasks)
        return store

    def train_at_random(self, monkeypatch, config: StoreConfig) -> dict:
        """Have `random_vector` stand in for `sift`: what a task gives depends on its first letter and its number of examples."""

        def train(model, examples, settings, task, trainable, **_):
            return random_vector(config, ord(task[0]) + 1000 * (len(examples) - 1))

        monkeypatch.setattr("siftmasks.training.sift", train)
        model = torch.nn.Module()
        for name, weight in load_file(self.base).items():
            model.register_parameter(name, torch.nn.Parameter(weight))
        return {"model": model, "loss": lambda *_: None}


def few(tasks: str) -> dict[str, list[Example]]:
    """Data of one example per task, for `Small.train_at_random`."""
    return {task: [Example("only", {})] for task in tasks}


@pytest.fixture
def unhurried(monkeypatch):
    """Small tensors gain nothing from threads, which wait for each other on a busy machine; no test here cuts the power."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    yield
    numba.set_num_threads(threads)


@pytest.fixture
def small(tmp_path, unhurried) -> Small:
    return Small(tmp_path)


@dataclass(frozen=True)
class Trained:
    """A real tiny Llama saved as `base`, and data to train it on."""

    base: Path
    model: torch.nn.Module

    def loss(self, model, examples):
        ids = torch.tensor([example.fields["ids"] for example in examples])
        return model(input_ids=ids, labels=ids).loss

    def examples(self, task: str, count: int = 3) -> list[Example]:
        random = np.random.default_rng([*task.encode()])
        return [Example(f"{task}-{i}", {"ids": random.integers(0, 16, 8).tolist()}) for i in range(count)]

    def data(self, tasks: str) -> dict[str, list[Example]]:
        return {task: self.examples(task) for task in tasks}

    @property
    def how(self) -> dict:
        return {"model": self.model, "loss": self.loss}

    def store(self, path: Path, base: Path | None = None, **options) -> Store:
        names = ("mode", "bits", "seed", "density", "learning_rate")
        settings = SiftSettings(
            **{"learning_rate": 1e-2, "steps": 2} | {key: options.pop(key) for key in names if key in options}
        )
        return Store.init(path, base or self.base, settings=settings, **{"max_tasks": 20} | options)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Trained:
    model = tiny_llama(vocab_size=16, hidden_size=16, layers=1, heads=2)
    base = tmp_path_factory.mktemp("model") / "base"
    model.save_pretrained(base)
    return Trained(base, model)


@pytest.fixture
def trained(saved_model, unhurried) -> Trained:
    return saved_model
