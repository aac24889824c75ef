"""A re-derivation that is not, in every bit, what was learned never touches the ledger; the proof says nothing once the task is gone."""

import json

import pytest
import torch

from lmcore.errors import UserError
from siftmasks.commitments import Commitment, RederivationMismatch, commit
from siftmasks.store import Store

from .conftest import contents, few, random_vector


def test_other_data_are_a_mismatch_that_names_task_and_tensors(trained, tmp_path):
    store = trained.store(tmp_path / "store")
    store.learn_many(trained.data("AB"), **trained.how)
    before = contents(store.path)
    with pytest.raises(RederivationMismatch, match="task 'A' is not the one that was learned: it differs in") as caught:
        store.forget("A", {"A": trained.examples("B")}, **trained.how)
    assert {*caught.value.tensors["A"]} <= {*store.config.tensors}
    assert "rebuild from the data of the 1 other tasks" in str(caught.value)
    assert contents(store.path) == before
    store.forget("A", trained.data("A"), **trained.how)


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_one_level_or_sign_of_one_tensor_is_enough(small, monkeypatch, mode):
    store = small.store("store", "A", mode=mode, policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)

    def almost(model, examples, settings, task, trainable, **_):
        vector = random_vector(store.config, ord(task))
        if mode == "signs":
            vector.signs["b"][0] ^= 1
        else:
            vector.levels["b"][12] ^= 1
        return vector

    monkeypatch.setattr("siftmasks.training.sift", almost)
    with pytest.raises(RederivationMismatch) as caught:
        store.forget("A", few("A"), **how)
    assert caught.value.tensors == {"A": ["b"]}


def test_in_a_batch_one_mismatch_keeps_all(small, monkeypatch):
    store = small.store("store", "ABC", policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    wrong = few("ABC") | {"B": few("B")["B"] * 2, "C": few("C")["C"] * 2}
    before = contents(store.path)
    with pytest.raises(RederivationMismatch, match="and so do 1 other tasks") as caught:
        store.forget(["A", "B", "C"], wrong, **how)
    assert {*caught.value.tensors} == {"B", "C"}
    assert contents(store.path) == before


def test_what_has_changed_since_is_in_the_message(small, monkeypatch):
    store = small.store("store", "A", policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    monkeypatch.setattr("siftmasks.commitments.here", lambda: {"processor": "another", "versions": {"torch": "9"}})
    with pytest.raises(RederivationMismatch, match=r"Since then: .*processor .* -> another.*torch .* -> 9"):
        store.forget("A", {"A": few("A")["A"] * 2}, **how)


def test_archived_levels_are_compared_before_they_are_subtracted(small, monkeypatch):
    store = small.store("store", "AB")
    archive = store.path / "archive/A.safetensors"
    data = bytearray(archive.read_bytes())
    data[-1] ^= 1
    archive.write_bytes(data)
    before = contents(store.path)
    with pytest.raises(RederivationMismatch) as caught:
        store.forget("A")
    assert caught.value.tensors == {"A": ["b"]}
    with pytest.raises(RederivationMismatch):
        store.rebuild("B", {})
    assert contents(store.path) == before
    with pytest.raises(UserError, match=r"archive/A.safetensors is damaged in b"):
        store.check()
    store.forget("A", few("A"), **small.train_at_random(monkeypatch, store.config))
    assert store.digest() == small.store("other", "B").digest()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_commitment_is_not_taken_for_a_mismatch(small, monkeypatch, damage):
    store = small.store("store", "AB", policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    sidecar = store.path / "sidecar/A.json"
    if damage == "flip":
        fields = json.loads(sidecar.read_text())
        fields["key"] = "0" * 64
        sidecar.write_text(json.dumps(fields))
    elif damage == "truncate":
        sidecar.write_text(sidecar.read_text()[:-20])
    else:
        sidecar.unlink()
    with pytest.raises(UserError, match=r"sidecar/A.json (is damaged|cannot be read)") as caught:
        store.forget("A", few("A"), **how)
    assert not isinstance(caught.value, RederivationMismatch)
    with pytest.raises(UserError, match=r"sidecar/A.json"):
        store.check()
    store.rebuild("A", few("B"), **how)
    store.check()
    assert store.digest() == small.store("other", "B", policy="rederive").digest()


def test_commitment_is_a_function_of_key_name_shape_levels_and_signs():
    levels, signs = torch.arange(8, dtype=torch.uint8).numpy(), torch.tensor([7], dtype=torch.uint8).numpy()
    codes = {
        commit(b"k", "a", levels, None), commit(b"l", "a", levels, None), commit(b"k", "b", levels, None),
        commit(b"k", "a", levels[::-1], None), commit(b"k", "a", levels.reshape(2, 4), None), commit(b"k", "a", levels, signs),
        commit(b"k", "a", levels.view("uint16"), None),
    }  # fmt: skip
    assert len(codes) == 7
    assert commit(b"k", "a", levels, None) == commit(b"k", "a", levels.copy(), None)


def test_commitments_are_random_outside_the_digest_and_go_with_the_task(small):
    one, other = small.store("one", "AB"), small.store("other", "AB")
    assert one.digest() == other.digest()
    codes = [Commitment.read(store.path / "sidecar/A.json") for store in (one, other)]
    assert codes[0].key != codes[1].key
    assert all(codes[0].tensors[name] != codes[1].tensors[name] for name in ("a", "b"))
    one.forget("A")
    left = b"".join(contents(one.path).values())
    assert codes[0].key.hex().encode() not in left
    assert not any(code.encode() in left for code in codes[0].tensors.values())
    assert Store.open(one.path).snapshot().commitment("B").tensors.keys() == {"a", "b"}
