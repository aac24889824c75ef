"""The certificate says what the store is now, and not a bit about what was forgotten."""

import errno
import json
import os

import pytest

from lmcore.errors import UserError
from siftmasks import forgetting
from siftmasks.examples import Example
from siftmasks.exclusive import locked
from siftmasks.store import Store

from .conftest import contents, few, random_vector


def test_two_different_pasts_give_one_certificate(trained, tmp_path):
    """The forgotten task has other data, and another number of them, in the two pasts."""
    texts = []
    for past, forgotten in enumerate([trained.examples("B", count=2), trained.examples("X", count=5)]):
        store = trained.store(tmp_path / f"store {past}")
        store.learn_many({"secret": forgotten, "A": trained.examples("A")}, **trained.how)
        store.forget("secret", {"secret": forgotten}, **trained.how, certificate=tmp_path / f"{past}.json")
        texts.append((tmp_path / f"{past}.json").read_text())
    assert texts[0] == texts[1]
    assert "secret" not in texts[0]


def test_other_numbers_and_names_of_forgotten_tasks_give_the_same_certificate(small):
    few_of_them, many = small.store("few", "AB"), small.store("many", "ACDEF")
    few_of_them.forget("B", certificate=small.folder / "few.json")
    many.forget([*"CDEF"], certificate=small.folder / "many.json")
    assert (small.folder / "few.json").read_bytes() == (small.folder / "many.json").read_bytes()


def test_certificate_says_what_the_store_is_and_how_it_came_to_be(small, monkeypatch):
    store, how = small.store("store", "ABCD"), None
    how = small.train_at_random(monkeypatch, store.config)
    place = small.folder / "certificate.json"
    returned = store.forget(["A", "B"], few("B"), **how, certificate=place, note="request 17")
    certificate = json.loads(place.read_text())
    assert certificate == returned
    assert certificate["digest"] == store.digest()
    assert certificate["tasks"] == 2
    assert certificate["config_sha256"] == store.config.sha256
    assert certificate["base_sha256"] == store.config.base
    assert {*certificate["methods"]} == {"rederive", "archive"}
    assert certificate["note"] == "request 17"
    assert certificate["environment"]["versions"]["torch"]
    assert any("backups" in line for line in certificate["not_covered"])
    assert {*store.rebuild("C", {}, certificate=small.folder / "certificate rebuild.json")["methods"]} == {"rebuild"}
    replaced = store.forget_without(
        "D", ["more"], [*few("D")["D"], Example("more", {})], **how, certificate=small.folder / "certificate replaced.json"
    )
    assert {*replaced["methods"]} == {"archive"}
    assert {*store.certify(small.folder / "certificate certify.json")["methods"]} == {"none"}
    assert not [path for path in store.path.rglob("*") if "certificate" in path.name]


@pytest.mark.parametrize(
    "place", ["store", "store/certificate.json", "store/masks/certificate.json", "missing/certificate.json"]
)
def test_a_certificate_in_the_store_is_refused_before_anything_is_done(small, place):
    store = small.store("store", "AB")
    before = contents(store.path)
    with pytest.raises(UserError, match="is not a place for a certificate"):
        store.forget("A", certificate=small.folder / place)
    assert contents(store.path) == before


def test_a_certificate_never_replaces_a_file(small):
    store, data = small.store("store", "AB"), small.folder / "alice.jsonl"
    data.write_text("{}")
    for write in (lambda: store.forget("A", certificate=data), lambda: store.certify(data)):
        with pytest.raises(UserError, match=r"alice\.jsonl exists"):
            write()
    assert (store.tasks, data.read_text()) == (["A", "B"], "{}")


def test_a_certificate_that_cannot_be_written_is_left_for_later(small, monkeypatch):
    store, place = small.store("store", "AB"), small.folder / "certificate.json"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as changed, pytest.raises(UserError) as error:
        changed.setattr("siftmasks.certificate.write_json", full)
        store.forget("A", certificate=place)
    assert "store is complete, but " in str(error.value)
    assert "could not be written (No space left on device): run `siftmasks certify` for it" in str(error.value)
    assert (store.tasks, place.exists()) == (["B"], False)
    assert store.certify(place)["digest"] == small.store("other", "B").digest()


def test_there_is_no_certificate_while_the_old_version_is_still_there(small, monkeypatch):
    store = small.store("store", "AB")
    monkeypatch.setattr("lmcore.record.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"its old version could not be removed: remove .*store.partial, then certify"):
        store.forget("A", certificate=small.folder / "certificate.json")
    assert not (small.folder / "certificate.json").exists()
    monkeypatch.undo()
    assert Store.open(store.path).tasks == ["B"]
    (small.folder / ".store.partial").mkdir()
    with monkeypatch.context() as changed, pytest.raises(UserError, match=r"could not be removed: remove .*store.partial"):
        changed.setattr("siftmasks.exclusive.shutil.rmtree", lambda *_, **__: None)
        store.certify(small.folder / "certificate.json")
    assert not (small.folder / "certificate.json").exists()
    assert Store.open(store.path).tasks == ["B"]
    assert {path.name for path in small.folder.iterdir()} == {"base.safetensors", "store", ".store.lock"}
    assert store.certify(small.folder / "certificate.json")["digest"] == small.store("other", "B").digest()


@pytest.mark.parametrize(
    "file", ["ledger/total-0.safetensors", "masks/A.safetensors", "archive/A.safetensors", "masks/left.safetensors"]
)
def test_what_is_not_sound_is_not_certified(small, file):
    store = small.store("store", "A")
    (store.path / file).write_bytes(b"")
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        store.certify(small.folder / "certificate.json")
    assert not (small.folder / "certificate.json").exists()


def test_nothing_is_certified_while_another_process_writes_and_its_remains_are_cleared_first(small):
    store, partial = small.store("store", "A"), small.folder / ".store.partial"
    with locked(store.path), pytest.raises(UserError, match="another process is writing to"):
        store.certify(small.folder / "certificate.json")
    partial.mkdir()
    store.certify(small.folder / "certificate.json")
    assert not partial.exists()


@pytest.mark.parametrize("change", ["forget", "forget_examples", "rebuild"])
def test_the_certificate_is_that_of_the_deletion_whatever_is_learned_next(small, monkeypatch, change):
    store, place = small.store("store", "AB"), small.folder / "certificate.json"
    how = small.train_at_random(monkeypatch, store.config)
    usual, digests = getattr(forgetting, change), []

    def then_another_learns(*arguments):
        result = usual(*arguments)
        digests.append(store.digest())
        store._add([("C", random_vector(store.config, 1))])
        return result

    monkeypatch.setattr(forgetting, change, then_another_learns)
    if change == "forget_examples":
        examples = [Example("stays", {}), Example("goes", {})]
        certificate = store.forget_without("A", ["goes"], examples, **how, certificate=place)
    else:
        certificate = getattr(store, change)("A", {}, certificate=place)
    assert [certificate["digest"]] == digests
    assert certificate["digest"] != store.digest()
