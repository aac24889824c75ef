"""One command adds a model to a database, and another tells what is wrong with one."""

import json
import os
import re
import signal

import pytest

from lmcore import cli
from lmcore.models import tiny_llama
from lmcore.record import published
from scaling_meta.database import Database
from scaling_meta.import_command import Export, Import
from scaling_meta.validate_command import Validate


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama(vocab_size=100, hidden_size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def command(*args) -> tuple[int, str, str]:
        capsys.readouterr()  # what was printed before
        status = cli.main("scaling-meta", "", [Import, Validate, Export], [str(arg) for arg in args])
        return status, *capsys.readouterr()

    return command


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_joins_the_shipped_ones_with_one_command(run, model, tmp_path):
    given = [
        word for text in ("tokens_billions=15", "share_code=8", "family=Tiny", "released=2025-01") for word in ("--set", text)
    ]
    status, out, _ = run("import", model, "--into", tmp_path / "mine", "--json", *given)
    result = json.loads(out)
    assert status == 0
    assert result["new"] == {"models": 1, "facts": 15, "scores": 0}
    assert (result["changed"], result["conflicts"], result["without_family"]) == (0, [], [])
    database = Database.open(tmp_path / "mine")
    assert len(database.models) == 93
    row = database.table().models.index("tiny")
    assert database.table().families[row] == "Tiny"
    assert database.facts["tiny", "share_code"].value == 8


def test_importing_twice_changes_nothing_more(run, model, tmp_path):
    def add(*more) -> dict:
        return json.loads(run("import", model, "--into", tmp_path / "mine", "--empty", "--json", *more)[1])

    assert add("--set", "dimension=48", "--cite", "a card")["new"]["models"] == 1
    before = contents(tmp_path / "mine")
    assert add("--set", "dimension=48", "--cite", "a card")["new"] == {"models": 0, "facts": 0, "scores": 0}
    assert contents(tmp_path / "mine") == before
    (conflict,) = add()["conflicts"]
    assert (conflict["item"], conflict["kept"], conflict["other"]) == ("dimension", "48", "32")
    assert (conflict["kept_source"], conflict["other_source"]) == ("a card", "config.json of tiny")
    before = contents(tmp_path / "mine")
    assert add()["conflicts"] == [conflict]
    assert contents(tmp_path / "mine") == before
    assert add("--prefer", "new")["changed"] == 1
    assert Database.open(tmp_path / "mine").facts["tiny", "dimension"].value == 32
    assert [conflict.kept for conflict in Database.open(tmp_path / "mine").conflicts()] == ["32", "48"]


def test_people_are_told_what_was_left_out_and_where_sources_disagree(run, model, tmp_path):
    run("import", model, "--into", tmp_path / "mine", "--empty", "--set", "num_heads=8")
    acc = {"acc,none": 0.4, "acc_stderr,none": 0.01}
    results = {
        "results": {"winogrande": acc, "hellaswag": acc},
        "n-shot": {"winogrande": 5, "hellaswag": 0},
        "model_name": "tiny",
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = run("import", tmp_path / "results.json", "--into", tmp_path / "mine")[1]
    assert "new: 0 models, 0 facts, 1 scores; changed: 0" in out
    assert "tiny has no family and counts as one of its own" in out
    assert "left out: tiny, hellaswag: run with 0 shots, hellaswag takes 10" in out
    out = run("import", model, "--into", tmp_path / "mine")[1]
    assert "conflict: tiny num_heads: kept 8 (command line), not 4 (config.json of tiny)" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "dimension"], "--set dimension: write NAME=VALUE"),
        (["--set", "share_code=1", "--set", "share_code=2"], "--set share_code is there twice"),
        (
            ["--set", "share_web=60", "--set", "share_code=60"],
            "facts.csv, row .*: the shares of tiny .share_web, share_code. sum to 120 %",
        ),
        (["--map", "a=b"], "--map is for a plain CSV"),
        (["--kind", "paper"], "model_annotations.csv is missing"),
    ],
)
def test_what_cannot_be_imported_leaves_no_trace(run, model, tmp_path, args, message):
    status, out, err = run("import", model, "--into", tmp_path / "mine", "--empty", *args)
    assert (status, out) == (2, "")
    assert err.startswith("scaling-meta: ")
    assert re.search(message, err)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_with_other_files_is_left_alone(run, model, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    status, _, err = run("import", model, "--into", tmp_path / "notes")
    assert status == 2
    assert "holds notes.txt, which is no part of a database" in err
    assert contents(tmp_path / "notes") == {"notes.txt": b"mine"}


def test_two_imports_at_once_cannot_lose_either(run, model, tmp_path):
    run("import", model, "--into", tmp_path / "mine", "--empty")
    before = contents(tmp_path / "mine")
    with pytest.raises(ZeroDivisionError), published(tmp_path / "mine", overwrite=True):
        status, _, err = run("import", model, "--into", tmp_path / "mine", "--set", "share_code=8")
        raise ZeroDivisionError
    assert status == 2
    assert "another process is writing" in err
    assert contents(tmp_path / "mine") == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_import_leaves_the_database_as_it_was(run, model, tmp_path, monkeypatch):
    arguments = ("import", model, "--into", tmp_path / "mine", "--empty", "--set")
    run(*arguments, "share_code=8")
    before, write = contents(tmp_path / "mine"), Database.write_files

    def killed(self, folder):
        write(self, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Database, "write_files", killed)
        run(*arguments, "share_web=80")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert contents(tmp_path / "mine") == before
    run(*arguments, "share_web=80")
    assert {"share_code", "share_web"} <= {field for _, field in Database.open(tmp_path / "mine").facts}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tiny"]


def test_validate_counts_and_tells_conflicts(run):
    status, out, _ = run("validate", "--json")
    result = json.loads(out)
    assert (status, result["models"], result["problems"]) == (0, 92, [])
    assert "EleutherAI/pythia-14m" in {conflict["model"] for conflict in result["conflicts"]}
    assert result["missing"]["biases"] == pytest.approx(58 / 92)
    assert "92 models" in run("validate")[1]


def test_validate_lists_every_problem(run, model, tmp_path):
    run("import", model, "--into", tmp_path / "mine", "--empty")
    path = tmp_path / "mine" / "facts.csv"
    path.write_text(path.read_text().replace("tiny,dimension,32", "tiny,dimension,-32").replace("swiglu", "tanh"))
    status, out, err = run("validate", tmp_path / "mine")
    assert (status, out) == (2, "")
    first, second, last = err.splitlines()
    assert re.fullmatch(r"facts.csv, row \d+, column value: -32 is not at least 1", first)
    assert "column value: 'tanh' is none of" in second
    assert "mine: 2 problems, listed above" in last


def test_export_writes_one_table(run, tmp_path):
    status, out, _ = run("export", tmp_path / "wide.csv", "--json")
    assert status == 0
    assert json.loads(out)["models"] == 92
    assert (tmp_path / "wide.csv").read_text().startswith("model,family,organisation,released,params,")
    assert run("export", tmp_path / "wide.csv")[0] == 2
    assert "there is no folder" in run("export", tmp_path / "absent" / "wide.csv")[2]
    assert run("export", tmp_path / "wide.csv", "--overwrite")[0] == 0
