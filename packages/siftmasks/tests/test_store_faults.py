"""Damage is found and named, whatever is damaged and however; what cannot be written leaves the store as it was."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lmcore.errors import UserError
from siftmasks.examples import Example
from siftmasks.store import Store

from .conftest import contents, few, random_vector


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


DAMAGES = [flip, truncate, empty, remove]
LEDGERS = ["ledger/total-0.safetensors", "ledger/count-0.safetensors"]


@pytest.mark.parametrize("file", [*LEDGERS, "masks/A.safetensors", "archive/A.safetensors", "sidecar/A.json", "base.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_that_is_damaged_is_named(small, damage, file):
    store = small.store("store", "AB")
    damage(store.path / file)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        store.check()


@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_with_damaged_config_or_manifest_is_not_used(small, damage, file):
    store = small.store("store", "AB")
    damage(store.path / file)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        Store.open(store.path).check()  # a wrong hash in the manifest makes a sound file look damaged: it is seen there


@pytest.mark.parametrize(
    "text", [b"[]", b"\xff", b"{}", b'{"files": 3, "tasks": 0, "counts": {}}', b'{"files": {}, "tasks": 1, "counts": {}}']
)
def test_a_manifest_of_another_form_is_not_opened(small, text):
    store = small.store()
    (store.path / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Store.open(store.path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", LEDGERS)
def test_a_damaged_ledger_is_neither_served_nor_changed_but_rebuilt(small, monkeypatch, damage, file):
    store = small.store("store", "AB")
    digest = store.digest()
    damage(store.path / file)
    before = contents(store.path)
    store = Store.open(store.path)
    with pytest.raises(UserError, match=f"{file.replace('.', '[.]')} is damaged or missing"):
        dict(store.weights("A", "count"))
    with pytest.raises(UserError, match="is damaged or missing"):
        store._add([("C", random_vector(store.config, 1))])
    with pytest.raises(UserError, match="is damaged or missing"):
        store.forget("A")
    assert contents(store.path) == before
    store.rebuild([], {})
    store.check()
    assert store.digest() == digest


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mask_is_not_served(small, monkeypatch, damage):
    store = small.store("store", "AB", policy="rederive")
    digest = store.digest()
    damage(store.path / "masks/A.safetensors")
    with pytest.raises(UserError, match=r"masks/A\.safetensors is damaged or missing"):
        dict(store.weights("A"))
    dict(store.weights("B"))
    store.rebuild([], few("AB"), **small.train_at_random(monkeypatch, store.config))
    store.check()
    assert store.digest() == digest


def test_a_ledger_that_never_held_a_task_says_so(small):
    """Commitment and hashes all in order, as after a forgery: the sums still tell."""
    store, other = small.store("store", "AB"), small.store("other", "B")
    forged = small.folder / "forged"
    shutil.copytree(other.path, forged)
    for folder in ("masks", "sidecar", "archive"):
        for path in (store.path / folder).glob("A.*"):
            shutil.copy(path, forged / folder / path.name)
    from siftmasks.snapshot import Manifest

    manifest, mine = other.snapshot().manifest, store.snapshot().manifest
    files = {**manifest.files, "masks/A.safetensors": mine.files["masks/A.safetensors"]}
    (forged / "manifest.json").write_bytes(Manifest(files, 2, manifest.counts).to_bytes())
    before = contents(forged)
    with pytest.raises(UserError, match="would fall below zero without 'A': rebuild"):
        Store.open(forged).forget("A")
    assert contents(forged) == before


def test_something_left_without_any_task_says_so(small):
    both, one = small.store("both", "AB"), small.store("one", "A")
    for path in (both.path / "ledger").iterdir():
        shutil.copy(path, one.path / "ledger" / path.name)
    from siftmasks.snapshot import Manifest

    manifest = one.snapshot().manifest
    files = {name: both.snapshot().manifest.files.get(name, digest) for name, digest in manifest.files.items()}
    (one.path / "manifest.json").write_bytes(Manifest(files, 1, manifest.counts).to_bytes())
    with pytest.raises(UserError, match="something is left of a without any task: rebuild"):
        Store.open(one.path).forget("A")


def test_damage_that_keeps_size_and_time_of_a_file_is_seen(small):
    """This process has hashed the file before."""
    store = small.store("store", "AB")
    dict(store.weights("A"))
    file = store.path / "masks/A.safetensors"
    times = file.stat()
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"masks/A\.safetensors is damaged or missing"):
        dict(store.weights("A"))


def test_a_version_published_while_one_is_read_is_no_damage(small, monkeypatch):
    """After the first read of its manifest and of a sidecar, each is another's."""
    store, other, usual = small.store("store", "AB"), small.store("other", "A"), Path.read_bytes

    def read_bytes(path):
        data = usual(path)
        if path.name in ("manifest.json", "A.json") and store.path in path.parents:
            path.write_bytes(usual(other.path / path.relative_to(store.path)))
        return data

    key = store.snapshot().commitment("A").key
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    snapshot = store.snapshot()
    assert snapshot.tasks == ["A", "B"]
    assert snapshot.commitment("A").key == key
    assert (store.snapshot().tasks, store.snapshot().commitment("A").key != key) == (["A"], True)


def test_files_that_do_not_belong_there_are_named(small):
    store = small.store("store", "A")
    for stray in ("masks/B.safetensors", "sidecar/B.json", "notes.txt"):
        (store.path / stray).write_text("who forgot me?")
    with pytest.raises(UserError, match=r"masks/B.safetensors does not belong there; notes.txt .*; sidecar/B.json"):
        store.check()
    store._add([("C", random_vector(store.config, 1))])
    store.check()
    assert not (store.path / "notes.txt").exists(), "a new version has what belongs there and nothing else"


def test_a_full_disk_changes_nothing(small):
    """A limit on the size of a file stands in for the end of the disk; it ends only this block, and a write gets EFBIG for ENOSPC."""
    store = small.store("store", "A", max_tasks=2**23)
    before, beside = contents(store.path), {path.name for path in small.folder.iterdir()}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, usual[1]))
        with pytest.raises(UserError, match=r"no room beside .*it is unchanged"):
            store._add([("B", random_vector(store.config, 1))])
        with pytest.raises(UserError, match="no room"):
            store.backup(small.folder / "backup")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(store.path) == before
    assert {path.name for path in small.folder.iterdir()} <= beside | {".backup.lock"}
    store._add([("B", random_vector(store.config, 1))])


def test_an_error_half_way_changes_nothing(small):
    store = small.store("store", "A")
    before, beside = contents(store.path), {path.name for path in small.folder.iterdir()}

    def vectors():
        yield "B", random_vector(store.config, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store._add(vectors())
    assert contents(store.path) == before
    assert {path.name for path in small.folder.iterdir()} == beside


def test_digest_and_tasks_need_no_torch(small):
    """The command line answers before torch could be imported."""
    store = small.store("store", "AB")
    code = "import sys; from siftmasks.store import Store; s = Store.open(sys.argv[1]); print(s.digest(), s.tasks, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{store.digest()} ['A', 'B'] False"


_read_only: set[Path] = set()


@pytest.fixture
def read_only():
    """A place in which nothing can be made, changed or removed, also not by root: the system's calls are refused as they are made."""
    if not hasattr(sys, "_siftmasks_refuses"):
        sys.addaudithook(_refuse)  # for the life of the process
        sys._siftmasks_refuses = True
    yield _read_only.add
    _read_only.clear()


def _refuse(event, arguments):
    changes = event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")
    if _read_only and (changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
        places = [Path(os.fsdecode(one)) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
        if any(root in place.parents for root in _read_only for place in places):
            raise PermissionError(13, "Permission denied")


def test_a_store_that_cannot_be_written_beside_is_verified_in_a_temporary_folder(
    small, monkeypatch, read_only, tmp_path_factory
):
    store = small.store("store", "AB", policy="rederive")
    how, temporary = small.train_at_random(monkeypatch, store.config), tmp_path_factory.mktemp("temporary")
    store.rebuild([], few("AB"), **how)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before, beside = contents(store.path), {path.name for path in small.folder.iterdir()}
    read_only(small.folder)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        store.forget("A", few("A"), **how)
    store = Store.open(store.path)
    assert store.verify(few("AB"), **how).equal
    other = store.verify({**few("A"), "B": [Example("one", {}), Example("two", {})]}, **how)
    assert other.different == ("ledger/count-0.safetensors", "ledger/total-0.safetensors", "masks/B.safetensors")
    assert contents(store.path) == before
    assert {path.name for path in small.folder.iterdir()} == beside
    assert [*temporary.iterdir()] == []


@pytest.mark.parametrize("file", [*LEDGERS, "masks/A.safetensors", "sidecar/A.json", "base.json"])
def test_a_damaged_file_is_not_verified(small, monkeypatch, file):
    """Its hash in the manifest is still that of a rebuild."""
    store = small.store("store", "AB", policy="rederive")
    how = small.train_at_random(monkeypatch, store.config)
    store.rebuild([], few("AB"), **how)
    assert store.verify(few("AB"), **how).equal
    flip(store.path / file)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        store.verify(few("AB"), **how)
    assert {path.name for path in small.folder.iterdir()} == {"base.safetensors", "store", ".store.lock"}


def test_a_base_is_not_looked_for_where_a_damaged_file_says(small):
    store = small.store("store", "A")
    flip(store.path / "base.json")
    with pytest.raises(UserError, match=r"base\.json is damaged.*: open the store with base="):
        Store.open(store.path).base()
    assert len(dict(Store.open(store.path, base=small.base).weights("A"))) == 2


def test_damage_is_reported_with_the_commands_that_help(small):
    def said(act):
        with pytest.raises(UserError) as found:
            act()
        return str(found.value)

    store = small.store("store", "A")
    flip(store.path / "ledger/total-0.safetensors")
    flip(store.path / "sidecar/A.json")
    helps = "bring a backup back with `siftmasks restore`, or make the ledgers anew with `siftmasks forget --rebuild`"
    for act in (lambda: store.weights("A"), lambda: store.snapshot().commitment("A")):
        assert said(lambda act=act: dict(act() or ())).endswith(
            f"Find all that is damaged with `siftmasks check`, then {helps}"
        )
    assert said(store.check).endswith(f"Now {helps}")
    assert said(store.check).count("`siftmasks") == 2, "said once, not with every file"
    for damage in (truncate, empty):
        damage(store.path / "manifest.json")
        assert said(lambda: Store.open(store.path)).endswith("Bring a backup back with `siftmasks restore`")
