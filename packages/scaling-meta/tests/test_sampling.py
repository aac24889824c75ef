"""Free texts follow the model's distribution, depend on seed and index alone, and reach the same file after any kill."""

import json
import math
import random
import re
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver, get_context

import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import bpe_tokenizer, character_tokenizer
from scaling_meta.features_command import Features
from scaling_meta.sampling import Sampling, draw_texts, sample_texts, start_token

SMALL = Sampling(samples=10, max_tokens=12, batch_size=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Rows of these sizes gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(seed: int = 0):
    tokenizer = bpe_tokenizer(["low lower lowest slow slower", "new newer newest"], 280)
    return tiny_llama(vocab_size=280, hidden_size=32, layers=2, max_positions=160, seed=seed), tokenizer


@pytest.fixture
def tiny():
    return tiny_model()


def test_first_tokens_are_as_frequent_as_they_are_probable():
    tokenizer = character_tokenizer("abcdefgh")
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=32)
    model.model.embed_tokens.weight.data.mul_(8)  # tied to the head: makes the distribution uneven
    number, temperature = 1500, 1.5
    drawn = draw_texts(model, tokenizer, range(number), Sampling(max_tokens=1, temperature=temperature, top_p=0.9))
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    descending, token = (logits / temperature).softmax(-1).sort(descending=True)
    kept = descending.cumsum(0) - descending < 0.9
    expected = number * descending[kept] / descending[kept].sum()
    shown = [tokenizer.decode(one, skip_special_tokens=True) for one in token]
    observed = torch.tensor([float(sum(text.text == one for text in drawn)) for one in shown])
    visible = torch.tensor([one != "" for one in shown])
    assert 3 <= kept.sum() < len(tokenizer)
    assert observed[visible & ~kept].sum() == 0
    assert (observed[kept] - expected).abs()[visible[kept]].max() < 5 * math.sqrt(number) / 2


def test_a_text_depends_on_seed_and_index_alone_not_on_its_batch(tiny):
    sampling = Sampling(max_tokens=40)
    together = draw_texts(*tiny, range(12), sampling)
    assert len({text.text for text in together}) == 12
    assert [draw_texts(*tiny, [i], sampling)[0] for i in range(12)] == together
    assert draw_texts(*tiny, [7, 3], sampling) == [together[7], together[3]]
    assert draw_texts(*tiny, range(12), replace(sampling, seed=1)) != together
    short = draw_texts(*tiny, range(12), replace(sampling, max_tokens=10))
    assert all(b.text.startswith(a.text.rstrip("\ufffd")) for a, b in zip(short, together, strict=True))


def test_positions_past_64_have_their_own_random_numbers():
    tokenizer = character_tokenizer("abcdefghijkl")
    model = tiny_llama(vocab_size=16, tie=False)
    model.lm_head.weight.data.zero_()
    silenced = torch.tensor([token in tokenizer.all_special_ids for token in range(16)])
    model.lm_head.bias = torch.nn.Parameter(torch.where(silenced, -1e4, 0.0))  # equal at all positions, and no end
    (text,) = draw_texts(model, tokenizer, [0], Sampling(max_tokens=200))
    assert (len(text.text), text.tokens, text.ended) == (200, 200, False)
    for period in range(1, 129):
        agreeing = sum(a == b for a, b in zip(text.text, text.text[period:], strict=False))
        assert agreeing < 0.4 * (200 - period), period  # a twelfth by chance


def test_an_end_token_ends_a_text_and_dropout_is_off(tiny):
    model, _ = tiny
    expected = draw_texts(*tiny, range(8), Sampling(max_tokens=100))
    model.generation_config.eos_token_id = list(range(3, 130))
    model.generation_config.top_k = 1  # of the generation config, only the end tokens count
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    drawn = draw_texts(*tiny, range(8), Sampling(max_tokens=100))
    assert model.training
    assert all(text.ended and text.tokens < 100 for text in drawn)
    assert all(long.text.startswith(short.text.rstrip("\ufffd")) for short, long in zip(drawn, expected, strict=True))


def test_texts_begin_after_bos_or_the_documented_fallback(tiny):
    model, tokenizer = tiny
    assert start_token(*tiny) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    model.config.bos_token_id = 7
    assert start_token(*tiny) == 7
    model.config.bos_token_id = None
    assert start_token(*tiny) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        start_token(*tiny)


def test_a_finished_run_is_left_as_it_is_and_returns_its_texts(tiny, tmp_path):
    first = sample_texts(*tiny, tmp_path, SMALL)
    path = tmp_path / "texts.jsonl"
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    records = [json.loads(line) for line in before.splitlines()]
    assert [record["index"] for record in records] == list(range(10))
    assert [record["text"] for record in records] == [text.text for text in first]
    assert sample_texts(*tiny, tmp_path, SMALL) == first
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, changed)


def test_a_file_cut_off_anywhere_is_completed_to_the_same_bytes(tiny, tmp_path):
    sample_texts(*tiny, tmp_path, SMALL)
    path = tmp_path / "texts.jsonl"
    whole = path.read_bytes()
    for size in [0, 1, whole.index(b"\n") + 1, *random.Random(0).sample(range(len(whole)), 3), len(whole) - 1]:
        path.write_bytes(whole[:size])
        sample_texts(*tiny, tmp_path, SMALL)
        assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def fork():
    """Starts processes at the price of a fork: of a server with one thread that has imported what takes time."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["scaling_meta.sampling", "transformers.trainer", "lmcore.random.numba"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context.Process


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(fork, tmp_path):
    for part in tiny_model():
        part.save_pretrained(tmp_path / "model")

    def command(name: str) -> Features:
        return Features(
            model=str(tmp_path / "model"), out=tmp_path / name, samples=60, max_tokens=20, batch_size=2, device="cpu"
        )

    def size() -> int:
        path = tmp_path / "killed" / "texts.jsonl"
        return path.stat().st_size if path.exists() else -1

    for wait in (0.0, 0.02):
        before, process = size(), fork(target=command("killed").run)
        process.start()
        while process.is_alive() and size() <= max(before, 0):
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    assert not (tmp_path / "killed" / "features.json").exists()
    results = [command(name).run() for name in ("killed", "whole")]
    assert results[0] == results[1]
    for name in ("texts.jsonl", "config.json", "features.json", "features.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_with_another_run_or_other_files_is_refused(tiny, tmp_path):
    sample_texts(*tiny, tmp_path / "run", SMALL)
    before = (tmp_path / "run" / "texts.jsonl").read_bytes()
    for model, sampling in ((tiny, replace(SMALL, seed=1)), (tiny, replace(SMALL, samples=9)), (tiny_model(seed=1), SMALL)):
        with pytest.raises(UserError, match="holds a run with other options"):
            sample_texts(*model, tmp_path / "run", sampling)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="or other files"):
        sample_texts(*tiny, tmp_path / "other", SMALL)
    assert (tmp_path / "run" / "texts.jsonl").read_bytes() == before


def test_a_folder_that_is_being_written_is_refused(tiny, tmp_path):
    import fcntl

    sample_texts(*tiny, tmp_path, SMALL)
    with open(tmp_path / "texts.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            sample_texts(*tiny, tmp_path, SMALL)


def test_a_file_this_run_did_not_write_is_refused_by_line(tiny, tmp_path):
    sample_texts(*tiny, tmp_path, SMALL)
    path = tmp_path / "texts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, damaged in (
        (3, [*lines[:2], lines[0], *lines[3:]]),
        (5, [*lines[:4], b"{\n", *lines[5:]]),
        (11, [*lines, lines[0]]),
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=rf"texts.jsonl, line {number}\b"):
            sample_texts(*tiny, tmp_path, SMALL)


def test_a_model_that_gives_nan_is_refused_by_text_and_token(tiny, tmp_path):
    tiny[0].model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="text 0, token 0: the model gives NaN"):
        sample_texts(*tiny, tmp_path, SMALL)
    assert (tmp_path / "texts.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_tokens": 161}, "max_tokens is 161: the model has 160 positions"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tiny, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sample_texts(*tiny, tmp_path, replace(SMALL, **options))
