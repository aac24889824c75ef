"""Forgetting leaves the store, and all that is served from it, bit for bit as if the forgotten had never been learned."""

import itertools
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.errors import UserError
from siftmasks.bits import unpack_bits
from siftmasks.signs import sign_vector

from .conftest import contents, few


def same(one, other) -> bool:
    return one.digest() == other.digest() and contents(one.path, canonical=True) == contents(other.path, canonical=True)


CASES = [(mode, policy, 8) for mode in ("sift", "signs") for policy in ("rederive", "archive", "groups")]
CASES += [(mode, "rederive", bits) for mode in ("sift", "signs") for bits in (4, 12)]


@pytest.mark.parametrize(("mode", "policy", "bits"), CASES, ids=str)
def test_forgetting_restores_the_store_bit_for_bit(trained, tmp_path, mode, policy, bits):
    options = {"mode": mode, "policy": policy, "bits": bits, "groups": 3 if policy == "groups" else 1}
    forgot, never = (trained.store(tmp_path / name, **options) for name in ("forgot", "never"))
    for task in "ABC":
        forgot.learn(task, trained.examples(task), **trained.how)
    three = forgot.digest()
    forgot.forget(["B"], {} if policy == "archive" else trained.data("B"), **trained.how)
    for task in "CA":
        never.learn(task, trained.examples(task), **trained.how)
    assert same(forgot, never)
    assert forgot.digest() != three
    assert forgot.tasks == ["A", "C"]
    scales = ("mean", "count", "density")
    for task, scale in itertools.product(("A", "C", None), scales):
        served = dict(forgot.weights(task, scale))
        assert all(torch.equal(served[name], weight) for name, weight in never.weights(task, scale))
    base = trained.model.state_dict()
    assert any(not torch.equal(base[name], weight) for name, weight in served.items()), "the tasks moved the weights"
    forgot.check()
    assert forgot.verify(trained.data("AC"), **trained.how).equal
    forgot.learn("B", trained.examples("B"), **trained.how)
    assert forgot.digest() == three


@pytest.mark.parametrize("policy", ["archive", "rederive", "groups"])
def test_only_the_live_tasks_matter_not_the_way_to_them(small, monkeypatch, policy):
    """Random histories of learning, forgetting and rebuilding, singly and in batches."""
    options = {
        "policy": policy,
        "groups": 3 if policy == "groups" else 1,
        "bits": 12,
        "mode": "signs" if policy == "groups" else "sift",
    }
    for history in range(6):
        choose, store = random.Random(history), small.store(f"{history}", **options)
        how = small.train_at_random(monkeypatch, store.config)
        for _ in range(4):
            absent = sorted({*"ABCDEFG"} - {*store.tasks})
            store.learn_many(few(choose.sample(absent, choose.randint(1, len(absent)))), **how)
            gone = choose.sample(store.tasks, choose.randint(1, len(store.tasks) - 1)) if store.tasks[1:] else store.tasks
            if choose.random() < 0.7:
                store.forget(gone, {} if policy == "archive" else few(gone), **how)
            else:
                store.rebuild(gone, few(store.remaining(gone)), **how)
        assert same(store, small.store(f"fresh {history}", "".join(store.tasks), **options))
        store.check()


def test_forgetting_all_leaves_an_empty_store(small):
    store, empty = small.store("store", "ABC"), small.store("empty")
    store.forget(["A", "C", "B"])
    assert same(store, empty)
    assert {*contents(store.path)} == {"config.json", "manifest.json", "base.json"}
    base = load_file(small.base)
    assert all(torch.equal(base[name], weight) for name, weight in store.weights(None))


def test_one_version_for_many_tasks_equals_one_version_each(trained, tmp_path):
    batch, single = trained.store(tmp_path / "batch"), trained.store(tmp_path / "single")
    batch.learn_many(trained.data("CAB"), **trained.how)
    for task in "ABC":
        single.learn(task, trained.examples(task), **trained.how)
    assert same(batch, single)
    batch.forget(["A", "B"], trained.data("AB"), **trained.how)
    for task in "BA":
        single.forget(task, trained.data(task), **trained.how)
    assert same(batch, single)


def test_order_of_the_examples_does_not_matter(trained, tmp_path):
    one, other = trained.store(tmp_path / "one"), trained.store(tmp_path / "other")
    one.learn("A", trained.examples("A"), **trained.how)
    other.learn("A", trained.examples("A")[::-1], **trained.how)
    assert same(one, other)


def test_sharding_of_the_base_does_not_matter(trained, tmp_path):
    trained.model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    whole, sharded = trained.store(tmp_path / "whole"), trained.store(tmp_path / "sharded", base=tmp_path / "shards")
    assert whole.digest() == sharded.digest(), "the base is the same"
    for store in (whole, sharded):
        store.learn("A", trained.examples("A"), **trained.how)
    assert same(whole, sharded)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.weights("A"), sharded.weights("A"), strict=True))


@pytest.mark.parametrize("policy", ["rederive", "archive"])
def test_forgetting_an_example_equals_never_having_had_it(trained, tmp_path, policy):
    forgot, never = (trained.store(tmp_path / name, policy=policy) for name in ("forgot", "never"))
    examples = trained.examples("A", count=5)
    forgot.learn_many({"A": examples, "B": trained.examples("B")}, **trained.how)
    forgot.forget_without("A", ["A-1", "A-4"], examples, **trained.how)
    rest = [example for example in examples if example.id not in ("A-1", "A-4")]
    never.learn_many({"A": rest, "B": trained.examples("B")}, **trained.how)
    assert same(forgot, never)
    forgot.forget("A", {"A": rest}, **trained.how)
    never.forget("A", {"A": rest}, **trained.how)
    assert same(forgot, never)


@pytest.mark.parametrize("policy", ["rederive", "archive", "groups"])
def test_rebuild_equals_forgetting(trained, tmp_path, policy):
    options = {"policy": policy, "groups": 2 if policy == "groups" else 1}
    rebuilt, forgot = (trained.store(tmp_path / name, **options) for name in ("rebuilt", "forgot"))
    for store in (rebuilt, forgot):
        store.learn_many(trained.data("ABCDEF"), **trained.how)
    needed = rebuilt.remaining("A")
    assert needed == list("BCDEF") if policy != "groups" else set() < {*needed} < {*"BCDEF"}, "a group is a part"
    rebuilt.rebuild("A", {} if policy == "archive" else trained.data("".join(needed)), **trained.how)
    forgot.forget("A", trained.data("A"), **trained.how)
    assert same(rebuilt, forgot)
    rebuilt.check()


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_checkpoints_add_their_task_vectors_and_are_forgotten_exactly(small, tmp_path, mode):
    base = load_file(small.base)
    torch.manual_seed(1)
    for task in "ABC":
        tuned = {name: weight + 1e-3 * torch.randn(weight.shape).to(weight.dtype) for name, weight in base.items()}
        save_file(tuned | {"frozen": base["frozen"]}, tmp_path / f"{task}.safetensors")
    sources = {task: tmp_path / f"{task}.safetensors" for task in "ABC"}
    store, single, never = (small.store(name, mode=mode, bits=12) for name in ("store", "single", "never"))
    reports = store.learn_many_from(sources)
    for task in "BCA":
        assert single.learn_from(task, sources[task]) == reports[task]
    assert same(store, single)
    total = 0
    step = store.config.settings.grid.step
    for task, source in sources.items():
        tau = load_file(source)["a"] - base["a"]
        if mode == "sift":
            kept = tau.where(tau * sign_vector(0, "a", (5, 7)) > 0, 0)
            assert 0.2 < reports[task].lost < 0.8
        else:
            kept = tau
            assert reports[task].lost == 0
            assert torch.equal(unpack_bits(store.snapshot().mask(task, "a"), 35).view(5, 7), tau > 0)
        total = total + (kept.abs() / step).round().clamp(max=4095)
    assert torch.equal(store.snapshot().ledger("total", "a").float(), total)
    assert store.verify({}, checkpoints=sources).equal
    store.forget("B")
    never.learn_many_from({task: sources[task] for task in "CA"})
    assert same(store, never)


@pytest.mark.parametrize("options", [{"mode": "sift"}, {"mode": "signs"}, {"density": 0.3}], ids=str)
def test_threads_that_add_checkpoints_give_the_store_of_one(small, tmp_path, options):
    base, tasks, usual = load_file(small.base), "ABCDEFGH", torch.get_num_threads()
    torch.manual_seed(2)
    for task in tasks:
        tuned = {name: weight + 1e-3 * torch.randn(weight.shape).to(weight.dtype) for name, weight in base.items()}
        save_file(tuned | {"frozen": base["frozen"]}, tmp_path / f"{task}.safetensors")
    sources = {task: tmp_path / f"{task}.safetensors" for task in tasks}
    stores, reports = [], []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            stores.append(small.store(f"threads-{threads}", **options))
            reports.append(stores[-1].learn_many_from(sources))
            assert stores[-1].verify({}, checkpoints=sources).equal
    finally:
        torch.set_num_threads(usual)
    assert same(*stores)
    assert reports[0] == reports[1]
    for task in tasks:
        name = f"archive/{task}.safetensors"
        assert (stores[0].path / name).read_bytes() == (stores[1].path / name).read_bytes()
    save_file(base | {"b": base["b"] * float("inf")}, sources["F"])
    refused = small.store("refused", **options)
    before = contents(refused.path)
    with pytest.raises(UserError, match=r"F\.safetensors: b has NaN or infinity"):
        refused.learn_many_from(sources)
    assert contents(refused.path) == before


def test_a_float_sum_is_not_exact_and_the_ledger_is(small):
    """Why the ledger holds integers: what a running float32 sum keeps of a task that was subtracted."""
    generator = torch.Generator().manual_seed(0)
    vectors = [1e-3 * torch.randn(20_000, generator=generator) for _ in range(60)]
    running, never, step = torch.zeros(20_000), torch.zeros(20_000), 2.0**-16
    whole, part = torch.zeros(20_000, dtype=torch.int64), torch.zeros(20_000, dtype=torch.int64)
    for number, vector in enumerate(vectors):
        running += vector
        whole += (vector / step).round().long()
        if number != 30:
            never += vector
            part += (vector / step).round().long()
    running -= vectors[30]
    whole -= (vectors[30] / step).round().long()
    assert (running != never).float().mean() > 0.1
    assert torch.equal(whole, part)
