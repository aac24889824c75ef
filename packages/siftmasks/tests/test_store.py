"""A store takes what it can use, refuses the rest by name, and is as before after every error."""

import copy
import json
import os
import resource
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.base_model import check_model
from siftmasks.bits import unpack_bits
from siftmasks.canonical import quoted, to_json, unquoted
from siftmasks.config import FORMAT
from siftmasks.exclusive import locked
from siftmasks.settings import SiftSettings
from siftmasks.signs import sign_vector
from siftmasks.snapshot import Manifest
from siftmasks.store import Store
from siftmasks.task_vector import TaskVector

from .conftest import contents, few, random_vector


def assert_refused(store: Store, message: str, change, *arguments, **named) -> None:
    """`change` raises a `UserError` with `message`, and not a byte of the store, nor a file beside it, is another."""
    before, beside = contents(store.path), {path.name for path in store.path.parent.iterdir()} | {f".{store.path.name}.lock"}
    with pytest.raises(UserError, match=message):
        change(*arguments, **named)
    assert contents(store.path) == before
    assert {path.name for path in store.path.parent.iterdir()} <= beside


def test_store_lists_its_tasks_and_opens_again(small):
    store = small.store("store", "CAB")
    again = Store.open(store.path)
    assert again.tasks == ["A", "B", "C"]
    assert again.digest() == store.digest()
    assert again.config == store.config
    assert again.config.dtypes == {"levels": "U8", "total": "U16", "count": "U8"}
    again.check()


def test_ledger_is_the_sum_of_the_levels_and_masks_are_where_they_are_not_zero(small):
    store = small.store("store", "AB")
    vectors = [random_vector(store.config, ord(task)) for task in "AB"]
    snapshot = store.snapshot()
    for name in ("a", "b"):
        levels = [vector.levels[name].int() for vector in vectors]
        assert torch.equal(snapshot.ledger("total", name).int(), sum(levels))
        assert torch.equal(snapshot.ledger("count", name).int(), sum((level > 0).int() for level in levels))
        assert torch.equal(unpack_bits(snapshot.mask("B", name), levels[1].numel()).view(levels[1].shape), levels[1] > 0)


@pytest.mark.parametrize("mode", ["sift", "signs"])
@pytest.mark.parametrize("scale", ["mean", "count", "density"])
def test_served_weights_are_those_of_the_formula(small, mode, scale):
    store = small.store("store", "AB", mode=mode)
    step, base = store.config.settings.grid.step, load_file(small.base)
    vectors = {task: random_vector(store.config, ord(task)) for task in "AB"}
    counted = sum(int((level > 0).sum()) for vector in vectors.values() for level in vector.levels.values())
    for task in ("B", None):
        for name, weight in store.weights(task, scale):
            levels = {one: vector.levels[name].double() for one, vector in vectors.items()}
            if mode == "sift":
                sign = {one: sign_vector(0, name, base[name].shape).double() for one in "AB"}
            else:
                bits = {one: unpack_bits(vector.signs[name], base[name].numel()) for one, vector in vectors.items()}
                sign = {one: 2.0 * bit.view(base[name].shape) - 1 for one, bit in bits.items()}
            count = sum((level > 0).double() for level in levels.values())
            factor = {"mean": 1 / 2, "count": 1 / count.clamp(min=1), "density": store.config.size / counted}[scale]
            if task is None:
                delta = sum(sign[one] * levels[one] for one in levels)
            else:
                delta = sum(levels.values()) * (sign[task] * (levels[task] > 0) if mode == "sift" else sign[task])
            expected = base[name].double() + delta * step * factor
            assert torch.allclose(weight.double(), expected, rtol=2**-7 if weight.dtype == torch.bfloat16 else 1e-6)
            assert weight.dtype == base[name].dtype
    assert {weight.dtype for _, weight in store.weights("A", dtype=torch.float16)} == {torch.float16}


def test_names_of_tasks_are_any_text_but_never_a_path(small):
    store = small.store(max_tasks=20)
    odd = ["../../evil", ".", "..", "a/b", "base", "config.json", "ü b", "A" * 200, "%2E", "con\n", "\0", "alice@example.com"]
    store._add((task, random_vector(store.config, 1)) for task in odd)
    assert Store.open(store.path).tasks == sorted(odd)
    store.check()
    assert {path.parent for path in store.path.glob("masks/*")} == {store.path / "masks"}
    assert all(unquoted(quoted(task)) == task for task in odd)
    store.forget(odd)
    assert store.tasks == []


@pytest.mark.parametrize(
    ("task", "message"), [("", "is empty"), ("ä" * 40, "takes 240 bytes"), ("\ud800", "not valid Unicode")]
)
def test_names_that_no_file_can_have_are_refused(small, task, message):
    store = small.store("store", "A")
    assert_refused(store, message, store._add, [(task, random_vector(store.config, 1))])


def test_a_task_is_learned_once(small, monkeypatch):
    store = small.store("store", "A")
    how = small.train_at_random(monkeypatch, store.config)
    monkeypatch.setattr("siftmasks.training.sift", None)  # refused before anything is trained
    assert_refused(store, "'A' is in .* already: forget it first", store.learn, "A", few("A")["A"], **how)
    vector = random_vector(store.config, 1)
    assert_refused(store, "'B' is in .* already", store._add, [("B", vector), ("B", vector)])


def test_no_more_than_max_tasks_are_learned(small):
    store = small.store("store", "AB", max_tasks=2)
    assert_refused(store, "2 of at most 2 tasks, and 1 more", store._add, [("C", random_vector(store.config, 1))])
    largest = {name: torch.full(shape, 255, dtype=torch.uint8) for name, (_, shape) in store.config.tensors.items()}
    full = small.store("full", max_tasks=2)
    full._add((task, TaskVector(largest, None, 0)) for task in "AB")
    assert full.snapshot().ledger("total", "a").unique().tolist() == [510], "the ledger has room for the worst case"


def test_levels_beyond_the_grid_never_enter_the_ledger(small):
    store = small.store(bits=4)
    beyond = TaskVector(
        {name: torch.full(shape, 16, dtype=torch.uint8) for name, (_, shape) in store.config.tensors.items()}, None, 0
    )
    before = contents(store.path)
    with pytest.raises(ValueError, match="level of 16, beyond the grid's 15"):
        store._add([("A", beyond)])
    assert contents(store.path) == before


def test_unknown_tasks_are_named(small, monkeypatch):
    store = small.store("store", "AB")
    how = small.train_at_random(monkeypatch, store.config)
    assert_refused(store, "task 'C' is not in .*, which has 2 others", store.forget, ["A", "C"])
    assert_refused(store, "task 'C' is not in", store.rebuild, ["C"], {})
    assert_refused(store, "task 'C' is not in", store.forget_without, "C", ["only"], few("C")["C"] * 2, **how)
    assert_refused(store, "task 'C' is not in", store.weights, "C")
    assert_refused(store, "no task is named", store.forget, [])


def test_data_are_needed_to_train(small, monkeypatch):
    store = small.store("store", "AB", policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    assert_refused(store, "task 'C' has no examples", store.learn, "C", [], **how)
    assert_refused(store, "task 'B' has no examples", store.forget, ["A", "B"], few("A"), **how)
    assert_refused(store, "model and loss are needed", store.forget, ["A"], few("A"))
    assert_refused(store, "task 'B' has no examples", store.rebuild, ["A"], {}, **how)
    assert_refused(store, "'B' is missing from the data", store.verify, few("A"), **how)
    assert_refused(store, "'C' is not in the store", store.verify, few("ABC"), **how)


def test_examples_to_forget_are_named_and_some_remain(small, monkeypatch):
    store = small.store(policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    store.learn("A", few("A")["A"], **how)
    assert_refused(store, "no example 'other'", store.forget_without, "A", ["other"], few("A")["A"], **how)
    assert_refused(store, "0 of 1 examples .* forget the task", store.forget_without, "A", ["only"], few("A")["A"], **how)
    assert_refused(store, "1 of 1 examples", store.forget_without, "A", [], few("A")["A"], **how)


def test_a_loss_that_is_not_finite_changes_nothing(trained, tmp_path):
    store = trained.store(tmp_path / "store")
    store.learn("A", trained.examples("A"), **trained.how)

    def loss(model, examples):
        return trained.loss(model, examples) * float("nan" if examples[0].id.startswith("C") else 1)

    assert_refused(store, "the loss is nan", store.learn_many, trained.data("BC"), model=trained.model, loss=loss)


def test_the_model_must_be_the_base(trained, tmp_path):
    store = trained.store(tmp_path / "store")
    moved = copy.deepcopy(trained.model)
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert_refused(
        store,
        "mlp.up_proj.weight of the model is not that of the base",
        store.learn,
        "A",
        trained.examples("A"),
        model=moved,
        loss=trained.loss,
    )
    other = torch.nn.Linear(2, 2)
    assert_refused(
        store,
        "model has weight, which the base lacks",
        store.learn,
        "A",
        trained.examples("A"),
        model=other,
        loss=trained.loss,
    )


def test_a_zero_of_the_other_sign_is_not_the_base(small):
    save_file({"a": torch.zeros(2)}, small.base)
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(-torch.zeros(2))
    with Checkpoint.open(small.base) as base:
        with pytest.raises(UserError, match="a of the model is not that of the base"):
            check_model(model, base, SiftSettings())
        torch.nn.init.zeros_(model.a)
        check_model(model, base, SiftSettings())


def test_another_base_is_refused_and_a_moved_one_is_given(small, tmp_path):
    store = small.store("store", "A")
    weights = load_file(small.base)
    small.base.rename(tmp_path / "moved.safetensors")
    assert_refused(Store.open(store.path), "cannot be read .*open the store with base=", store.weights, "A")
    served = dict(Store.open(store.path, base=tmp_path / "moved.safetensors").weights("A"))
    assert served.keys() == {"a", "b"}
    save_file(weights | {"frozen": weights["frozen"] + 1}, tmp_path / "other.safetensors")
    other = Store.open(store.path, base=tmp_path / "other.safetensors")
    assert_refused(other, "is not the base of", other.weights, "A")
    assert_refused(other, "is not the base of", other.learn_from, "B", tmp_path / "moved.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["nothing"]}, "nothing is to be trained, but .* has no such tensor"),
        ({"trainable": []}, "no tensor is trainable"),
        ({"trainable": None}, "no config.json"),
        ({"max_tasks": 0}, "max_tasks is 0"),
        ({"max_tasks": 2**26}, "a ledger of 8-bit levels holds 1 to"),
        ({"groups": 2}, "groups is 2: the policy groups takes"),
        ({"policy": "groups"}, "groups is 1: the policy groups takes 2 or more"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_make_no_store(small, options, message):
    with pytest.raises(UserError, match=message):
        small.store("store", **options)
    assert not (small.folder / "store").exists()


def test_embeddings_and_head_are_left_out_by_default(trained, tmp_path):
    names = {*trained.store(tmp_path / "store").config.tensors}
    assert {name for name in trained.model.state_dict() if "embed_tokens" in name or "lm_head" in name}.isdisjoint(names)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    frozen = Store.init(tmp_path / "frozen", trained.base, settings=SiftSettings(freeze=["norm"]))
    assert {*frozen.config.tensors} == {name for name in names if "norm" not in name}
    assert frozen.config == Store.open(frozen.path).config


def test_a_store_is_not_made_over_anything(small):
    store = small.store("store", "A")
    assert_refused(store, "exists: choose another folder", small.store, "store")
    (small.folder / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        small.store("file")


def test_what_is_no_store_is_not_opened(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a store: it does not exist"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no manifest.json"):
        Store.open(tmp_path)


def test_a_newer_format_is_named(small):
    store = small.store()
    newer = to_json(json.loads((store.path / "config.json").read_text()) | {"format": FORMAT + 1, "more": True})
    (store.path / "config.json").write_bytes(newer)
    manifest = Manifest({"config.json": sha256(newer).hexdigest()}, 0, {})
    (store.path / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(UserError, match=r"config.json has format 2, this siftmasks reads up to 1"):
        Store.open(store.path)


def test_a_second_writer_is_sent_away_at_once(small):
    store = small.store("store", "A")
    with locked(store.path):
        assert_refused(store, "another process is writing to", store.forget, "A")
        assert_refused(store, "another process is writing to", store.verify, few("A"))
        assert Store.open(store.path).tasks == ["A"], "readers go on"
    store.forget("A")


def test_what_is_being_made_is_left_alone(small):
    """Opening clears what killed writers left: not what another process is writing just now."""
    store = small.store("store", "A")
    with locked(store.path):
        (small.folder / ".store.partial").mkdir()
        Store.open(store.path)
        assert (small.folder / ".store.partial").exists()
    Store.open(store.path)
    assert not (small.folder / ".store.partial").exists()
    with locked(small.folder / "new"), pytest.raises(UserError, match="another process is writing to"):
        small.store("new")
    assert small.store("deep/down/new").tasks == []


def test_a_reader_sees_one_version_or_says_that_it_changed(small):
    store = small.store("store", "AB")
    before, late = store.snapshot(), store.snapshot()
    total = before.ledger("total", "a")
    store.forget("B")
    assert torch.equal(before.ledger("total", "a"), total), "its files stay open"
    with pytest.raises(UserError, match="was changed by another process meanwhile: try again"):
        late.ledger("total", "a")


def test_checkpoints_need_the_archive_and_must_be_fine_tunes(small, tmp_path):
    base = load_file(small.base)

    def source(**changes):
        path = tmp_path / "tuned.safetensors"
        save_file({name: tensor for name, tensor in (base | changes).items() if tensor is not None}, path)
        return path

    rederive = small.store("rederive", policy="rederive")
    assert_refused(rederive, "needs the policy archive", rederive.learn_from, "A", source())
    store = small.store()
    assert_refused(
        store,
        "frozen differs from the base, but this store does not train it",
        store.learn_from,
        "A",
        source(frozen=base["frozen"] + 1),
    )
    assert_refused(store, r"a has the shape None, in the base \(5, 7\)", store.learn_from, "A", source(a=None))
    assert_refused(store, r"more has the shape \(1,\), in the base None", store.learn_from, "A", source(more=torch.zeros(1)))
    assert_refused(store, "b has NaN or infinity", store.learn_from, "A", source(b=base["b"] * float("nan")))
    assert_refused(store, "does not exist", store.learn_from, "A", tmp_path / "missing")
    report = store.learn_from("A", source(a=base["a"] + 100))
    assert report.saturated > 0
    assert store.learn_from("same", source()).lost == 0


def test_tasks_may_outnumber_the_files_that_can_be_open(small, tmp_path):
    base = load_file(small.base)
    save_file(base | {"a": base["a"] + 1e-3}, tmp_path / "tuned.safetensors")
    store = small.store(max_tasks=60)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, usual[1]))
    try:
        store.learn_many_from({f"imported {n}": tmp_path / "tuned.safetensors" for n in range(25)})
        store._add((f"trained {n}", random_vector(store.config, n)) for n in range(25))
        store.forget(store.tasks[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert store.tasks == ["imported 0"]


def test_density_keeps_the_largest_of_a_checkpoint(small, tmp_path):
    base = load_file(small.base)
    save_file(base | {"a": base["a"] + 1e-3 * torch.randn(5, 7)}, tmp_path / "tuned.safetensors")
    store = small.store(density=0.2)
    assert store.learn_from("A", tmp_path / "tuned.safetensors").lost > 0.1
    assert int((store.snapshot().ledger("total", "a").int() > 0).sum()) == 7


def test_a_density_needs_masks():
    """In mode "signs" a weight that is left out would have bit 0, and be served as minus what the other tasks have there."""
    with pytest.raises(UserError, match=r'density is 0\.2: it must be None in mode "signs"'):
        SiftSettings(mode="signs", density=0.2)


def test_what_is_not_trained_may_have_any_dtype(small, tmp_path):
    base = load_file(small.base)
    odd = {
        "whole": torch.arange(5), "unsigned": torch.tensor([3], dtype=torch.uint16), "yes": torch.tensor([True, False]),
        "scalar": torch.tensor(7), "eighth": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn), "nan": torch.tensor([float("nan")]),
        "complex": torch.tensor([1j, 2]), "small": torch.tensor([-1, 2], dtype=torch.int8),
    }  # fmt: skip
    save_file(base | odd, small.base)
    store = small.store()
    save_file(base | odd | {"a": base["a"] + 1e-3}, tmp_path / "tuned.safetensors")
    store.learn_from("A", tmp_path / "tuned.safetensors")
    assert store.tasks == ["A"]
    for name in ("whole", "yes", "eighth"):
        other = odd[name].flip(0) if name != "eighth" else torch.tensor([1.0, -3.0]).to(torch.float8_e4m3fn)
        save_file(base | odd | {name: other}, tmp_path / "other.safetensors")
        assert_refused(store, f"{name} differs from the base", store.learn_from, "B", tmp_path / "other.safetensors")


def test_backup_and_restore(small):
    store = small.store("store", "AB")
    digest = store.digest()
    store.backup(small.folder / "backup")
    store.forget("A")
    restored = Store.restore(small.folder / "backup", small.folder / "restored")
    assert restored.digest() == digest
    assert contents(restored.path) == contents(small.folder / "backup")
    restored.forget("A")
    assert restored.digest() == store.digest() != digest
    assert (small.folder / "backup/masks/A.safetensors").exists(), "a backup has bytes of its own"
    assert_refused(store, "exists", store.backup, small.folder / "backup")
    assert_refused(store, "lies inside", store.backup, store.path / "backup")
    (small.folder / "backup/masks/B.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"backup is damaged, .*masks/B.safetensors is damaged"):
        Store.restore(small.folder / "backup", small.folder / "second")
    assert not (small.folder / "second").exists()


def test_paths_may_be_relative_and_links(small, monkeypatch):
    store = small.store("store", "AB")
    monkeypatch.chdir(small.folder)
    Path("link").symlink_to("store")
    Store.open("link").forget("A")
    assert Store.open("store").tasks == Store.open("link").tasks == ["B"]
    assert Path("link").is_symlink()
    store.check()


def test_file_systems_without_hard_links_get_copies(small, monkeypatch):
    store, linked = small.store("store", "ABC"), small.store("linked", "BC")

    def link(*_):
        raise PermissionError

    monkeypatch.setattr("os.link", link)
    store.forget("A")
    assert store.digest() == linked.digest()
    store.check()
