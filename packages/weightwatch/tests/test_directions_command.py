import json

import pytest
import torch
import transformers

from lmcore import cli
from lmcore.models import tiny_llama
from weightwatch.directions import Directions
from weightwatch.directions_command import Directions as Command


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_llama(vocab_size=50, hidden_size=32)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.01 * torch.ones(32, 128)
    model.save_pretrained(folder / "post")
    return folder / "base", folder / "post"


def run(capsys, *args):
    # Two commands, since one alone needs no name.
    status = cli.main("weightwatch", "", [Command, Headline], ["directions", *map(str, args)])
    return status, *capsys.readouterr()


class Headline(cli.HeadlineCommand):
    """Not run."""


def test_directions_are_written_and_printed_as_json(pair, tmp_path, capsys):
    status, out, _ = run(capsys, *pair, "--out", tmp_path / "out", "--k", 3, "--json")
    result = json.loads(out)
    assert status == 0
    found = Directions.load(tmp_path / "out")
    assert (result["digest"], result["signal"], result["k"]) == (found.digest, 1, 3)
    assert (result["method"], result["base"], result["post"]) == ("difference", "base", "post")
    (row,) = [row for row in result["matrices"] if row["signal"]]
    assert (row["label"], row["name"], row["shape"]) == ("D1", "model.layers.1.mlp.down_proj.weight", [32, 128])
    assert row["sigma_1"] == pytest.approx(0.01 * (32 * 128) ** 0.5, rel=1e-4)
    assert row["largest_residual"] < 0.01 * row["sigma_1"]


def test_people_get_a_line_per_matrix(pair, tmp_path, capsys):
    _, out, _ = run(capsys, *pair, "--out", tmp_path / "out")
    lines = out.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[0].split() == ["writer", "signal", "structured", "sigma_1", "edge", "stable", "rank", "change", "matrix"]
    assert lines[3].split()[:4] == ["D1", "1", "1", "0.64"]
    assert lines[-1].startswith("1 directions above the noise edge; wrote ")
    _, out, _ = run(capsys, pair[0], pair[0], "--out", tmp_path / "same")
    assert out.splitlines()[-1].startswith("no difference above rounding; wrote ")


def test_raw_and_adapter_take_one_source(pair, tmp_path, capsys):
    status, out, _ = run(capsys, pair[1], "--raw", "--out", tmp_path / "raw", "--json")
    assert (status, json.loads(out)["method"]) == (0, "raw")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    from safetensors.torch import save_file

    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 128), name.format("B"): torch.ones(32, 2)}, adapter / "adapter_model.safetensors"
    )
    status, out, err = run(capsys, adapter, "--adapter", "--out", tmp_path / "alone", "--json")
    assert (status, json.loads(out)["signal"]) == (0, 1)
    assert "weightwatch: warning: " in err
    status, out, err = run(capsys, pair[0], adapter, "--adapter", "--out", tmp_path / "based", "--json")
    assert (status, json.loads(out)["base"], err) == (0, "base", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{base}"], "1 sources where BASE POST was expected"),
        (["{base}", "{post}", "--raw"], "2 sources where MODEL was expected"),
        (["{base}", "{post}", "{post}", "--adapter"], "3 sources where ADAPTER or BASE ADAPTER was expected"),
        (["{base}", "--raw", "--adapter"], "--raw and --adapter exclude each other"),
        (["{base}", "{post}", "--k", "0"], "--k 0: it must be at least 1"),
        (["{base}", "nowhere"], "nowhere does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(pair, tmp_path, capsys, args, message):
    args = [one.format(base=pair[0], post=pair[1]) for one in args]
    status, out, err = run(capsys, *args, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_but_directions_is_replaced(pair, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, *pair, "--out", out)[0] == 0
    before = (out / "directions.json").read_bytes()
    assert run(capsys, *pair, "--out", out)[0] == 2
    assert run(capsys, *pair, "--out", out, "--overwrite")[0] == 0
    assert (out / "directions.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert run(capsys, *pair, "--out", tmp_path / "mine", "--overwrite")[0] == 2
    assert run(capsys, *pair, "--out", pair[1], "--overwrite")[0] == 2
    assert (pair[1] / "model.safetensors").exists()
