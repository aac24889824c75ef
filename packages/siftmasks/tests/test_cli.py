"""The real command line, from making a store to its report, and what it says about everything that can go wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lmcore import claims
from siftmasks.store import Store

from .conftest import contents
from .tiny_tasks import QUICK, CommandLine, lines, save_base, write_data, write_jsonl

TASKS = ["alice", "bob", "carol"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def siftmasks(capsys, unhurried) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data", TASKS)


@pytest.fixture
def init(siftmasks, base, tmp_path):
    def make(*options: object, name: str = "store") -> Path:
        siftmasks.result("init", tmp_path / name, "--base", base, *QUICK, *options)
        return tmp_path / name

    return make


@pytest.fixture
def store(siftmasks, init, data) -> Path:
    """A store with all tasks."""
    siftmasks.result("learn-all", path := init(), "--data", data)
    return path


@pytest.fixture
def unchanged(tmp_path):
    """Not a byte of the store is another at the end of the test."""
    before: dict[str, bytes] = {}
    yield lambda store: before.update({"path": str(store).encode(), **contents(store)})
    assert contents(Path(before.pop("path").decode())) == before


def test_help_is_there_without_torch():
    code = """
import sys
from siftmasks import cli
try:
    cli.main(["learn-all", "--help"])
except SystemExit:
    print({"torch", "numpy"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--processes" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_public_names_arrive_on_first_use_and_stay_functions():
    code = """
import sys, siftmasks
print(sorted({"torch", "numpy", "siftmasks.sift"} & set(sys.modules)))
import siftmasks.settings
from siftmasks import SiftSettings
print(SiftSettings is siftmasks.settings.SiftSettings, "sift" in dir(siftmasks), "Store" in siftmasks.__all__)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\nTrue True True\n"


def test_learn_forget_learn_in_any_order_ends_at_one_digest(siftmasks, init, data, tmp_path):
    first, second = init(name="first"), init(name="second")
    for task in ("alice", "bob", "carol"):
        learned = siftmasks.result("learn", first, task, "--data", data / f"{task}.jsonl")
    assert learned["tasks"] == learned["examples"] == 3
    forgotten = siftmasks.result("forget", first, "bob", "--data", data / "bob.jsonl", "--certificate", tmp_path / "proof.json")
    for task in ("carol", "alice"):
        learned = siftmasks.result("learn", second, task, "--data", data)
    assert forgotten["digest"] == learned["digest"] == siftmasks.result("digest", first)["digest"]
    assert forgotten["certificate"] == json.loads((tmp_path / "proof.json").read_text())
    assert "bob" not in (tmp_path / "proof.json").read_text()
    assert siftmasks.result("tasks", first)["tasks"] == ["alice", "carol"]
    again = siftmasks.result("certify", second, "--certificate", tmp_path / "later.json", "--note", "request 7")
    assert (again["digest"], again["note"]) == (learned["digest"], "request 7")
    (data / "bob.jsonl").unlink()
    assert siftmasks.result("verify", first, "--data", data)["equal"]


@pytest.mark.parametrize("one", [{"mode": "signs"}, {"density": 0.5}], ids=str)
def test_every_option_of_init_is_in_the_config(siftmasks, base, tmp_path, one):
    options = {
        "max-tasks": 9, "policy": "groups", "groups": 3, "learning-rate": 0.5, "steps": 2, "batch-size": 2, "bits": 7,
        "headroom": 4.0, "dtype": "bfloat16", "threads": 2, "max-length": 9, "seed": 5,
    } | one  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    made = siftmasks.result("init", tmp_path / "store", "--base", base, *words, "--freeze", "mlp", "norm")
    config = Store.open(tmp_path / "store").config
    fixed = vars(config) | vars(config.settings)
    assert {name: fixed[name.replace("-", "_")] for name in options} == options
    assert config.settings.freeze == ("mlp", "norm")
    assert all("self_attn" in name for name in config.tensors)
    assert made["weights"] == config.size
    assert made["digest"] == Store.open(tmp_path / "store").digest()


def test_sizes_that_init_announces_are_those_on_the_disk(siftmasks, init, data):
    store = init("--policy", "archive")
    siftmasks.result("learn-all", store, "--data", data)
    from siftmasks.store_report import storage

    planned = storage(Store.open(store).config)
    tensors = [tensor for file in store.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(tensor.nbytes for tensor in tensors) == planned["ledger_bytes"] + 3 * planned["bytes_per_task"]


def test_examples_are_forgotten_as_if_they_had_never_been_there(siftmasks, store, init, data):
    forgotten = siftmasks.result("forget", store, "bob", "--examples", "bob-1", "--data", data)
    write_jsonl(data / "bob.jsonl", [line for line in lines("bob") if line["id"] != "bob-1"])
    assert forgotten["digest"] == siftmasks.result("learn-all", init(name="other"), "--data", data)["digest"]


def test_data_that_give_another_task_vector_change_nothing_and_rebuild_does(siftmasks, store, data):
    write_jsonl(data / "bob.jsonl", lines("bob")[1:])
    before = contents(store)
    error = siftmasks.refused("forget", store, "bob", "--data", data)
    assert "task 'bob' is not the one that was learned" in error
    assert "forget --rebuild --data" in error
    assert contents(store) == before
    rebuilt = siftmasks.result("forget", store, "bob", "--rebuild", "--data", data)
    assert rebuilt["tasks"] == 2
    (data / "bob.jsonl").unlink()
    assert siftmasks.result("verify", store, "--data", data)["digest"] == rebuilt["digest"]


def test_archive_needs_no_data_and_takes_fine_tunes_from_elsewhere(siftmasks, init, base, data, tmp_path):
    store = init("--policy", "archive")
    empty = siftmasks.result("digest", store)["digest"]
    tuned = tmp_path / "tuned" / "zoe"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(tuned)
    learned = siftmasks.result("learn", store, "zoe", "--from", tuned)
    assert 0.3 < learned["lost"] < 0.7, "about half lies against a random sign vector"
    siftmasks.result("learn", store, "bob", "--data", data)
    write_data(data, ["bob"])
    for other in ("alice", "carol"):
        (data / f"{other}.jsonl").unlink()
    assert siftmasks.result("verify", store, "--data", data, "--checkpoints", tmp_path / "tuned")["equal"]
    assert siftmasks.result("forget", store, "bob", "zoe", "--base", tmp_path / "gone")["digest"] == empty


def test_backup_and_restore(siftmasks, store, data, tmp_path):
    whole = siftmasks.result("backup", store, "--out", tmp_path / "backup")
    siftmasks.result("forget", store, "bob", "--data", data)
    restored = siftmasks.result("restore", tmp_path / "backup", tmp_path / "restored")
    assert (restored["digest"], restored["tasks"]) == (whole["digest"], 3)
    assert siftmasks.result("check", tmp_path / "restored")["sound"]
    assert "exists" in siftmasks.refused("restore", tmp_path / "backup", store)
    for no_backup, fault in ((data, "has no manifest.json"), (tmp_path / "nowhere", "does not exist")):
        assert siftmasks.refused("restore", no_backup, tmp_path / "x") == f"siftmasks: {no_backup} is not a store: it {fault}"
    assert not (tmp_path / "x").exists()


def test_export_writes_what_the_store_serves(siftmasks, store, tmp_path):
    for task, arguments in (("bob", ["bob"]), (None, ["--maskless"])):
        out = tmp_path / str(task)
        siftmasks.result("export", store, *arguments, "--out", out, "--scale", "count", "--dtype", "float32")
        written = load_file(out / "model.safetensors")
        for name, weight in Store.open(store).weights(task, "count"):
            assert torch.equal(written[name], weight)
    code, printed, _ = siftmasks("export", store, "bob", "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert code == 0
    assert "bfloat16: " in printed
    assert "energy lost" in printed
    for arguments in ([], ["bob", "--maskless"]):
        assert "either a task or --maskless" in siftmasks.refused("export", store, *arguments, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_evaluate_tells_held_in_from_held_out(siftmasks, store, data):
    siftmasks.result("forget", store, "carol", "--data", data)
    before = contents(store)
    result = siftmasks.result("evaluate", store, "--data", data, "--scale", "mean", "count")
    assert contents(store) == before
    rows = {row["task"]: row for row in result["tasks"]}
    assert rows["carol"]["served"] is None
    assert rows["alice"]["served"]["count"]["loss"] < rows["alice"]["maskless"]["count"]["loss"] < rows["alice"]["base"]["loss"]
    means = {(row["model"], row["scale"], row["over"]): row for row in result["means"]}
    held_in, held_out = means["served", "mean", "held in"], means["served", "mean", "held out"]
    assert (held_in["tasks"], held_out["tasks"]) == (2, 3)
    served = [rows[task]["served"]["mean"]["loss"] for task in ("alice", "bob")]
    assert held_in["loss"]["value"] == pytest.approx(sum(served) / 2)
    assert held_out["loss"]["value"] == pytest.approx((sum(served) + rows["carol"]["maskless"]["mean"]["loss"]) / 3)
    low, high, level = held_in["loss"]["interval"]
    assert (low + high) / 2 == pytest.approx(held_in["loss"]["value"])
    assert level == 0.95
    code, out, _ = siftmasks("evaluate", store, "--data", data / "bob.jsonl", "--tasks", "bob", "--metric", "loss")
    assert code == 0
    assert f"{rows['bob']['served']['mean']['loss']:.4f}" in out


def test_evaluate_agrees_with_an_exported_model(siftmasks, store, data, base, tmp_path):
    result = siftmasks.result("evaluate", store, "--data", data, "--tasks", "bob", "--scale", "count")
    siftmasks.result("export", store, "bob", "--out", tmp_path / "bob", "--scale", "count")
    siftmasks.result("init", tmp_path / "over", "--base", tmp_path / "bob", *QUICK)
    alone = siftmasks.result("evaluate", tmp_path / "over", "--data", data, "--tasks", "bob")
    assert alone["tasks"][0]["base"] == result["tasks"][0]["served"]["count"]


def test_labels_to_choose_among_are_those_of_the_data(siftmasks, store, data, tmp_path, monkeypatch):
    """Digits of the command line are the numbers of the data; what cannot be is said before the model is loaded."""
    chance = write_jsonl(tmp_path / "bob.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    options = ["evaluate", store, "--data", chance, "--tasks", "bob", "--labels"]
    given = siftmasks.result(*options, 1, 2, 3)["tasks"][0]["base"]
    words = write_jsonl(tmp_path / "words.jsonl", [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}])
    options[3] = words
    assert siftmasks.result(*options, 1, 2, 3)["tasks"][0]["base"] == given
    monkeypatch.setattr("siftmasks.models.load_trainee", None)
    assert "label '2' is not among --labels 1 3" in siftmasks.refused(*options, 1, 3)
    options[3] = data
    error = siftmasks.refused(*options, "a")
    assert "--labels is for data of text and label; those of task 'bob' have prompt and completion: leave it out" in error


@pytest.mark.parametrize("mode", ["sift", "signs"])
def test_report_counts_ledger_and_masks(siftmasks, init, data, tmp_path, mode):
    siftmasks.result("learn-all", store := init("--mode", mode), "--data", data)
    result = siftmasks.result("report", store, "--out", tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "report.json").read_text())
    snapshot = Store.open(store).snapshot()
    counts = torch.cat([snapshot.ledger("count", name).flatten() for name in snapshot.config.tensors])
    assert result["occupancy"] == counts.bincount(minlength=4).tolist()
    assert result["density"] == pytest.approx(counts.double().mean().item() / 3)
    assert sum(row["weights"] for row in result["tensors"]) == sum(result["occupancy"]) == snapshot.config.size
    assert sum(result["storage"]["now"].values()) == sum(map(len, contents(store).values()))
    bits = {
        task: torch.cat(
            [_bits(snapshot.mask(task, name), shape) for name, (_, shape) in sorted(snapshot.config.tensors.items())]
        )
        for task in TASKS
    }
    one, other = bits["alice"], bits["carol"]
    expected = (one & other).sum() / (one | other).sum() if mode == "sift" else (one == other).double().mean()
    assert result["overlap"]["measured"][0][2] == pytest.approx(float(expected))
    assert result["overlap"]["measured"][0][0] == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") == 3
    assert result["digest"] in page
    assert "choose another --out" in siftmasks.refused("report", store, "--out", tmp_path / "out")
    siftmasks.result("report", init(name="empty"), "--out", tmp_path / "out", "--overwrite")
    assert "<svg" not in (tmp_path / "out" / "index.html").read_text()


def _bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    from siftmasks.bits import unpack_bits

    return unpack_bits(packed, int(torch.Size(shape).numel()))


def test_headline_hands_its_options_on(siftmasks, monkeypatch, tmp_path):
    def headline(out, *, scale, seed, clinc):
        return [claims.not_tested(id="x", statement=f"{scale} {seed} {clinc}", why="a stand-in")]

    monkeypatch.setitem(sys.modules, "siftmasks.headline", types.SimpleNamespace(headline=headline))
    result = siftmasks.result("headline", "--out", tmp_path / "out", "--scale", "smoke", "--seed", 3, "--clinc", "file")
    assert result["package"] == "siftmasks"
    assert result["claims"][0]["statement"] == "smoke 3 file"


# What can go wrong.


@pytest.mark.parametrize(
    ("command", "help"),
    [
        *((name, "Changes nothing: all that is random") for name in ("learn", "learn-all", "forget", "digest", "tasks", "export")),
        *((name, "Changes nothing: all that is random") for name in ("check", "verify", "certify", "backup", "evaluate")),
        *((name, "Changes nothing: nothing here is random") for name in ("restore", "plan")),
        ("init", "Seed of the sign vector"), ("report", "Chooses the tasks to compare"), ("headline", "Seed of everything random"),
    ],
)  # fmt: skip
def test_help_tells_what_the_seed_changes(siftmasks, command, help):
    code, out, _ = siftmasks(command, "--help")
    assert code == 0
    assert help in " ".join(out.replace("│", " ").split())


def test_a_seed_that_is_not_the_stores_is_not_passed_over_in_silence(siftmasks, init, data):
    store = init("--seed", 5)
    for given, warned in ((7, True), (5, False), (0, False)):
        code, _, err = siftmasks("learn-all", store, "--data", data, "--seed", given)
        assert code == 0
        assert ("siftmasks: warning: --seed 7 changes nothing: `init` fixed the seed 5" in err) == warned


def test_ids_that_are_more_than_one_line_are_printed_in_one(siftmasks, init, base, data, tmp_path):
    store, strange = init("--policy", "archive"), "two\nlines \x1b[31m $x_$"
    for task in (strange, '"quoted"', "ünï ✓"):
        siftmasks.result("learn", store, task, "--from", base)
    _, out, _ = siftmasks("tasks", store)
    assert out.splitlines() == [r'"\"quoted\""', r'"two\nlines \u001b[31m $x_$"', "ünï ✓"]
    assert siftmasks.result("tasks", store)["tasks"] == ['"quoted"', strange, "ünï ✓"]
    siftmasks.result("report", store, "--out", tmp_path / "out")
    assert r"two\nlines" in (tmp_path / "out" / "index.html").read_text()
    rows = write_jsonl(tmp_path / "all.jsonl", [{"task": strange, **line} for line in lines("x")])
    _, out, _ = siftmasks("evaluate", store, "--data", rows)
    assert out.splitlines()[1].startswith(r'"two\nlines')


def test_transformers_shows_no_bars_where_standard_error_is_no_terminal():
    code = """
import sys
from siftmasks import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    from transformers.utils.logging import is_progress_bar_enabled
    print(is_progress_bar_enabled())
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    run = [sys.executable, "-c", code, "tasks", "nowhere"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


def test_missing_store_is_named(siftmasks, tmp_path, data):
    for command in (["digest"], ["tasks"], ["check"], ["learn-all", "--data", data], ["report", "--out", tmp_path / "x"]):
        assert "nowhere is not a store: it does not exist" in siftmasks.refused(command[0], tmp_path / "nowhere", *command[1:])
    assert "has no manifest.json" in siftmasks.refused("digest", data)


def test_unknown_task_is_named(siftmasks, store, data, tmp_path, unchanged):
    unchanged(store)
    for command in (["forget", store, "zoe", "--data", data], ["export", store, "zoe", "--out", tmp_path / "x"]):
        assert "task 'zoe' is not in" in siftmasks.refused(*command)
    assert "no task is named" in siftmasks.refused("forget", store, "--data", data)
    assert "no data of task 'zoe'" in siftmasks.refused("evaluate", store, "--data", data, "--tasks", "zoe")


def test_a_task_is_learned_once(siftmasks, store, data, unchanged, monkeypatch):
    unchanged(store)
    assert siftmasks.result("learn-all", store, "--data", data)["skipped"] == TASKS
    monkeypatch.setattr("siftmasks.models.load_trainee", None)  # it is said before the model is loaded
    assert "'bob' is in" in siftmasks.refused("learn", store, "bob", "--data", data)


def test_a_store_without_room_says_so_before_a_model_is_loaded(siftmasks, init, data, unchanged, monkeypatch):
    unchanged(store := init("--max-tasks", 3))
    monkeypatch.setattr("siftmasks.models.load_trainee", None)
    write_data(data, ["dave"])
    assert "has 0 of at most 3 tasks, and 4 more are to be learned" in siftmasks.refused("learn-all", store, "--data", data)


def test_another_base_is_refused(siftmasks, store, data, tmp_path, unchanged):
    unchanged(store)
    other = save_base(tmp_path / "other", seed=1)
    write_data(data, ["dave"])
    for command in (
        ["learn", store, "dave", "--data", data], ["learn-all", store, "--data", data], ["forget", store, "bob", "--data", data],
        ["evaluate", store, "--data", data], ["export", store, "bob", "--out", tmp_path / "x"],
    ):  # fmt: skip
        assert "its tensors have another hash" in siftmasks.refused(*command, "--base", other)
    assert "cannot be read" in siftmasks.refused("learn", store, "dave", "--data", data, "--base", tmp_path / "gone")


def test_a_base_that_has_moved_is_found_where_one_says(siftmasks, base, data, tmp_path):
    moved = save_base(tmp_path / "base")
    siftmasks.result("init", tmp_path / "store", "--base", moved, *QUICK)
    moved.rename(tmp_path / "elsewhere")
    assert "open the store with base=" in siftmasks.refused("learn", tmp_path / "store", "bob", "--data", data)
    siftmasks.result("learn", tmp_path / "store", "bob", "--data", data, "--base", tmp_path / "elsewhere")


@pytest.mark.parametrize("file", ["masks/bob.safetensors", "ledger/total-0.safetensors"])
def test_damage_is_named_and_never_served(siftmasks, store, data, tmp_path, file):
    damaged = bytearray((store / file).read_bytes())
    damaged[-1] ^= 1
    (store / file).write_bytes(damaged)
    commands = [["check", store], ["export", store, "bob", "--out", tmp_path / "x"], ["report", store, "--out", tmp_path / "y"]]
    for command in commands:
        error = siftmasks.refused(*command)
        assert file in error
        assert "damaged" in error
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_a_damaged_ledger_is_mended_by_a_rebuild(siftmasks, store, data):
    whole = siftmasks.result("digest", store)["digest"]
    (store / "ledger/total-0.safetensors").write_bytes(b"")
    assert "`siftmasks forget --rebuild`" in siftmasks.refused("forget", store, "bob", "--data", data)
    mended = siftmasks.result("forget", store, "--rebuild", "--data", data)
    assert (mended["forgotten"], mended["tasks"], mended["digest"]) == (0, 3, whole)
    assert siftmasks.result("check", store)["sound"]


@pytest.mark.parametrize("room", [300, 3000])
def test_a_full_disk_is_one_line_and_changes_nothing(siftmasks, store, data, tmp_path, room):
    """A limit on the size of a file stands in for the end of the disk: a write gets EFBIG where it would get ENOSPC."""
    write_data(data, ["dave"])
    before, beside = contents(store), {path.name for path in tmp_path.iterdir()}
    assert max(len(file) for file in before.values()) > 3000
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    commands = {
        "learn": ["dave", "--data", data], "learn-all": ["--data", data],
        "forget": ["bob", "--data", data, "--certificate", tmp_path / "proof.json"], "backup": ["--out", tmp_path / "backup"],
    }  # fmt: skip
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
        said = {name: siftmasks.refused(name, store, *options) for name, options in commands.items()}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    for name, line in said.items():
        assert "no room beside" in line, name
        assert "it is unchanged" in line, name
    assert contents(store) == before
    assert {path.name for path in tmp_path.iterdir()} <= beside | {".backup.lock"}
    assert siftmasks.result("learn", store, *commands["learn"])["tasks"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "dave.jsonl holds no example"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "dave.jsonl, line 2: not JSON"),
        ('{"prompt": "a"}\n', "dave.jsonl, line 1: needs prompt and completion, or text and label"),
        ('{"task": "bob", "prompt": "a", "completion": "b"}\n', "no data of task 'dave': it has those of 1 tasks, 'bob'"),
    ],
)
def test_data_that_cannot_be_used_are_named(siftmasks, store, data, unchanged, text, message):
    unchanged(store)
    (data / "dave.jsonl").write_text(text)
    assert message in siftmasks.refused("learn", store, "dave", "--data", data / "dave.jsonl")


def test_data_of_other_tasks_are_refused(siftmasks, store, data, unchanged):
    unchanged(store)
    (data / "bob.jsonl").unlink()
    assert "no data of task 'bob': it has those of 2 tasks" in siftmasks.refused("forget", store, "bob", "--data", data)
    assert "task 'bob' is missing from the data" in siftmasks.refused("verify", store, "--data", data)
    write_data(data, ["bob", "zoe"])
    assert "task 'zoe' is not in the store" in siftmasks.refused("verify", store, "--data", data)
    assert "give --data" in siftmasks.refused("forget", store, "bob")


def test_verify_names_what_differs(siftmasks, store, data, unchanged):
    unchanged(store)
    write_jsonl(data / "bob.jsonl", lines("bob")[1:])
    assert "is not what these data give on this machine" in siftmasks.refused("verify", store, "--data", data)


def test_a_loss_that_is_not_finite_is_named(siftmasks, data, tmp_path):
    """Weights so large that the model overflows."""
    broken = save_base(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, broken / "model.safetensors", {"format": "pt"})
    siftmasks.result("init", store := tmp_path / "store", "--base", broken, *QUICK)
    before = contents(store)
    error = siftmasks.refused("learn", store, "bob", "--data", data)
    assert "task 'bob', step" in error
    assert "the loss is nan" in error
    error = siftmasks.refused("learn-all", store, "--data", data)
    assert "3 of 3 tasks were not learned" in error
    assert all(f"{task}: task '{task}', step" in error for task in TASKS)
    assert contents(store) == before


def test_options_that_do_not_fit_each_other_are_refused(siftmasks, store, data, tmp_path, base, monkeypatch):
    both = ["--data", data, "--from", base]
    for options in ([], both):
        assert "either --data or --from" in siftmasks.refused("learn", store, "dave", *options)
    assert "needs the policy archive" in siftmasks.refused("learn", store, "dave", "--from", base)
    assert "--examples takes one task" in siftmasks.refused("forget", store, "bob", "alice", "--examples", "x", "--data", data)
    assert "choose 1 or more" in siftmasks.refused("learn-all", store, "--data", data, "--processes", 0)
    assert "device cuda:99 cannot be used here" in siftmasks.refused("learn-all", store, "--data", data, "--devices", "cuda:99")
    assert "is no folder" in siftmasks.refused("verify", store, "--checkpoints", data / "bob.jsonl")
    assert "takes 2 or more" in siftmasks.refused("init", tmp_path / "x", "--base", base, "--policy", "groups")
    assert "exists" in siftmasks.refused("init", store, "--base", base)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in siftmasks.refused("learn-all", store, "--data", data)


def test_certificates_have_their_place(siftmasks, store, data, unchanged):
    unchanged(store)
    inside = store / "proof.json"
    assert "is not a place" in siftmasks.refused("forget", store, "bob", "--data", data, "--certificate", inside)


def test_people_get_text(siftmasks, store, data, tmp_path):
    digest = Store.open(store).digest()
    for command, expected in (
        (["digest", store], f"{digest}\n"), (["tasks", store], "alice\nbob\ncarol\n"),
        (["learn-all", store, "--data", data], f"0 tasks learned, 3 were there, 3 in the store\ndigest {digest}\n"),
        (["verify", store, "--data", data], f"{store}: equal to a rebuild from the data of its 3 tasks\ndigest {digest}\n"),
        (["report", store, "--out", tmp_path / "out"], f"wrote {tmp_path / 'out' / 'index.html'}\n"),
    ):  # fmt: skip
        code, out, _ = siftmasks(*command)
        assert (code, out) == (0, expected)
    _, out, _ = siftmasks("forget", store, "bob", "alice", "--data", data, "--certificate", tmp_path / "proof.json")
    assert out.startswith(f"2 tasks forgotten, 1 tasks in the store\ncertificate {tmp_path / 'proof.json'}\ndigest ")
