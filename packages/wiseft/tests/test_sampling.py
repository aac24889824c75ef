"""Samples follow the model's distribution, do not depend on their batch, and reach the same file after any kill."""

import json
import random
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from wiseft import cli
from wiseft.decoding import Decoding, filtered_log_softmax
from wiseft.generation import Drawing, batches, complete, identity, requests_for
from wiseft.problems import Problem
from wiseft.sample_command import Sample
from wiseft.samples import read_samples
from wiseft.sampling import sample
from wiseft.verifiers import Verdict, exact, gsm8k

PROBLEMS = [Problem("sum", "1+2=", "3"), Problem("long", "10+20=", "30"), Problem("other", "4+5=", "9")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Rows of these sizes gain nothing from a second thread, and lose much where another process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(seed: int = 0):
    tokenizer = character_tokenizer("0123456789+=")
    return tiny_llama(vocab_size=len(tokenizer), hidden_size=32, layers=2, max_positions=64, seed=seed), tokenizer


@pytest.fixture
def tiny():
    return tiny_model()


def draw(tiny, requests, *, decoding=Decoding(), seed=0, max_new_tokens=12):  # noqa: B008
    return complete(*tiny, requests, Drawing(decoding=decoding, seed=seed, max_new_tokens=max_new_tokens))


def test_first_tokens_are_as_frequent_as_they_are_probable(tiny):
    model, tokenizer = tiny
    model.model.embed_tokens.weight.data.mul_(5)  # tied to the head: makes the distribution uneven
    requests = requests_for(PROBLEMS[:1], tokenizer, n=4000)
    decoding = Decoding(temperature=1.5, top_p=0.95)
    with torch.no_grad():
        logits = model(torch.tensor(requests[0].prompt)[None]).logits[0, -1]
    expected = 4000 * filtered_log_softmax(logits, temperature=1.5, top_p=0.95).exp()
    drawn = draw(tiny, requests, decoding=decoding, max_new_tokens=1)
    texts = [tokenizer.decode(token, skip_special_tokens=True) for token in range(len(tokenizer))]
    observed = torch.tensor([float(sum(one.text == text and not one.ended for one in drawn)) for text in texts])
    visible = torch.tensor([text != "" for text in texts])
    assert observed[visible & (expected == 0)].sum() == 0
    tested = visible & (expected >= 5)
    assert tested.sum() >= 8
    chi_square = ((observed - expected)[tested] ** 2 / expected[tested]).sum()
    degrees = int(tested.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_score_is_the_log_probability_of_the_completion_under_the_model(tiny):
    model, tokenizer = tiny
    # No special token but the end is drawn: each would be missing from the text, which must give the tokens back.
    silenced = torch.tensor(
        [token in set(tokenizer.all_special_ids) - {tokenizer.eos_token_id} for token in range(len(tokenizer))]
    )
    model.lm_head.bias = torch.nn.Parameter(torch.where(silenced, -1e4, 0.0))
    requests = requests_for(PROBLEMS[:1], tokenizer, n=32)
    drawn = draw(tiny, requests, decoding=Decoding(temperature=2.0, top_k=12))
    assert {one.ended for one in drawn} == {True, False}
    for request, one in zip(requests, drawn, strict=True):
        tokens = tokenizer(one.text).input_ids + [tokenizer.eos_token_id] * one.ended
        assert len(tokens) == one.tokens
        assert one.ended or one.tokens == 12
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum().item()
        assert one.score == pytest.approx(expected, abs=1e-4)


def test_temperature_0_is_the_greedy_generation_of_transformers(tiny):
    model, tokenizer = tiny
    (request,) = requests_for(PROBLEMS[:1], tokenizer, n=1)
    prompt = torch.tensor([request.prompt])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    (found,) = draw(tiny, [request], decoding=Decoding(temperature=0.0))
    assert found.text == tokenizer.decode(expected[0, len(request.prompt) :], skip_special_tokens=True)


def test_a_sample_does_not_depend_on_its_place_or_company_in_the_batch(tiny):
    _, tokenizer = tiny
    sums, other = (requests_for([problem], tokenizer, n=16) for problem in (PROBLEMS[0], PROBLEMS[2]))
    expected = draw(tiny, sums)
    assert len({one.text for one in expected}) > 10
    shuffled = random.Random(0).sample(range(16), 16)
    found = draw(tiny, [sums[i] for i in shuffled])
    assert [one.text for one in found] == [expected[i].text for i in shuffled]
    mixed = draw(tiny, other[:8] + sums[8:])
    assert [one.text for one in mixed[8:]] == [one.text for one in expected[8:]]


def test_fewer_new_tokens_give_a_prefix(tiny):
    requests = requests_for(PROBLEMS[:1], tiny[1], n=16)
    short, long = draw(tiny, requests, max_new_tokens=5), draw(tiny, requests, max_new_tokens=12)
    assert all(b.text.startswith(a.text) for a, b in zip(short, long, strict=True))


def test_every_position_has_its_own_random_numbers():
    model, tokenizer = tiny_llama(vocab_size=16, max_positions=256, tie=False), tiny_model()[1]
    model.lm_head.weight.data.zero_()
    silenced = torch.tensor([token in tokenizer.all_special_ids for token in range(16)])
    model.lm_head.bias = torch.nn.Parameter(torch.where(silenced, -1e4, 0.0))  # equal at all positions, and no end
    (one,) = draw((model, tokenizer), requests_for(PROBLEMS[:1], tokenizer, n=1), max_new_tokens=200)
    assert len(one.text) == 200
    for period in range(1, 129):
        agreeing = sum(a == b for a, b in zip(one.text, one.text[period:], strict=False))
        assert agreeing < 0.4 * (200 - period), period  # a twelfth by chance


def test_seed_problem_and_number_each_change_the_sample(tiny):
    first, second = requests_for(PROBLEMS[:1], tiny[1], n=2)
    renamed = replace(first, problem="renamed")
    texts = [one.text for one in draw(tiny, [first, second, renamed])] + [draw(tiny, [first], seed=1)[0].text]
    assert len(set(texts)) == 4


def test_penalties_of_the_generation_config_are_not_applied_but_its_end_tokens_are(tiny):
    model, tokenizer = tiny
    requests = requests_for(PROBLEMS[:1], tokenizer, n=16)
    expected = draw(tiny, requests)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert draw(tiny, requests) == expected
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("=")]
    assert all("=" not in one.text for one in draw(tiny, requests))


def test_dropout_is_off_while_sampling_and_back_on_after(tiny):
    model, tokenizer = tiny
    requests = requests_for(PROBLEMS[:1], tokenizer, n=4)
    expected = draw(tiny, requests)
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert draw(tiny, requests) == expected
    assert model.training


def test_batches_hold_prompts_of_equal_length_longest_first(tiny):
    planned = batches(requests_for(PROBLEMS, tiny[1], n=3), 4)
    assert [[(one.problem, one.sample) for one in batch] for batch in planned] == [
        [("long", 0), ("long", 1), ("long", 2)],
        [("sum", 0), ("sum", 1), ("sum", 2), ("other", 0)],
        [("other", 1), ("other", 2)],
    ]


def test_the_template_and_the_chat_template_surround_the_prompt(tiny):
    _, tokenizer = tiny

    def text(**options):
        return tokenizer.decode(requests_for(PROBLEMS[:1], tokenizer, n=1, **options)[0].prompt, skip_special_tokens=True)

    assert text(template="9{prompt}9") == "91+2=9"
    with pytest.raises(UserError, match="no chat template"):
        text(chat="on")
    tokenizer.chat_template = (
        "{% for turn in messages %}7{{ turn.content }}{% endfor %}{% if add_generation_prompt %}8{% endif %}"
    )
    assert text() == text(chat="on") == "71+2=8"
    assert text(chat="off") == "1+2="


def test_a_chat_template_that_refuses_a_problem_is_named(tiny):
    _, tokenizer = tiny
    for template in ("{{ raise_exception('no system turn') }}", "{% if %}"):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"problem 'sum': the chat template fails .*--chat off"):
            requests_for(PROBLEMS[:1], tokenizer, n=1)


def test_identity_notices_one_changed_bit(tiny):
    model, tokenizer = tiny
    before = identity(model, tokenizer)
    assert identity(model, tokenizer) == before
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.view(torch.int32)[3, 5] ^= 1
    assert identity(model, tokenizer)["weights"] != before["weights"]


def run(out, *, tiny=None, problems=PROBLEMS, **options):
    settings = {"n": 6, "batch_size": 4, "max_new_tokens": 8, "verifier": gsm8k} | options
    return sample(*(tiny or tiny_model()), problems, out=out, **settings)


def test_the_file_is_what_passk_reads(tmp_path):
    result = run(tmp_path / "run", n=40)
    found = read_samples([tmp_path / "run" / "samples.jsonl"], votes=True)
    assert sorted(found.problems) == ["long", "other", "sum"]
    assert found.samples.tolist() == [40, 40, 40]
    assert found.correct.sum() / 120 == result["correct"] > 0
    assert all(isinstance(score, float) for scores in found.ballots.scores for score in scores)


def test_a_line_holds_the_verdict_on_its_completion(tmp_path):
    run(tmp_path / "run", n=20)
    answers = {problem.id: problem.answer for problem in PROBLEMS}
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        verdict = gsm8k(row["completion"], answers[row["problem"]])
        assert (row["correct"], row["answer"]) == (verdict.correct, verdict.answer)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = run(tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    second = run(tmp_path)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert second == first | {"tokens_per_second": None}


def test_a_file_cut_off_anywhere_is_completed_to_the_same_bytes(tmp_path, tiny):
    run(tmp_path, tiny=tiny)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    newline = whole.index(b"\n")
    for size in [0, 1, newline, newline + 1, *random.Random(0).sample(range(len(whole)), 6), len(whole) - 1]:
        path.write_bytes(whole[:size])
        run(tmp_path, tiny=tiny)
        assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[str | Path]:
    """A command that samples a saved model, but for its --out: what `run` does."""
    folder = tmp_path_factory.mktemp("saved")
    for part in tiny_model():
        part.save_pretrained(folder / "model")
    lines = [{"problem": problem.id, "prompt": problem.prompt, "answer": problem.answer} for problem in PROBLEMS]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["sample", folder / "model", "--problems", folder / "problems.jsonl", "--verifier", "gsm8k", "--device", "cpu"]
    return [*command, "--batch-size", "4", "--max-new-tokens", "8"]


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(saved, tmp_path, forks):
    rng, samples = random.Random(0), tmp_path / "killed" / "samples.jsonl"

    def size() -> int:
        return samples.stat().st_size if samples.exists() else -1

    for _ in range(6):
        before, wait = size(), rng.uniform(0, 0.02)
        forks.kill_when(lambda before=before: size() > before, *saved, "--n", "80", "--out", tmp_path / "killed", wait=wait)
    for name in ("killed", "whole"):
        with pytest.raises(SystemExit) as status:
            cli.main([str(part) for part in [*saved, "--n", "80", "--out", tmp_path / name]])
        assert status.value.code == 0
    for name in ("samples.jsonl", "run.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_with_another_configuration_is_refused_by_what_differs(tmp_path, tiny):
    run(tmp_path, tiny=tiny)
    before = (tmp_path / "samples.jsonl").read_bytes()
    for options, difference in (
        ({"n": 7}, "n: 6 before, 7 now"),
        ({"decoding": Decoding(temperature=0.5)}, "temperature: 1.0 before, 0.5 now"),
        ({"verifier": exact}, "verifier: gsm8k before, exact now"),
        ({"problems": [replace(PROBLEMS[0], answer="4"), *PROBLEMS[1:]]}, "problems: .* before, .* now"),
        ({"tiny": tiny_model(seed=1)}, "weights: .* before, .* now"),
    ):
        with pytest.raises(UserError, match=rf"another run \({difference}\).*--overwrite"):
            run(tmp_path, **({"tiny": tiny} | options))
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_overwrite_replaces_another_run_and_continues_the_same_one(tmp_path, tiny):
    run(tmp_path / "fresh", tiny=tiny, seed=1)
    run(tmp_path / "used", tiny=tiny)
    assert run(tmp_path / "used", tiny=tiny, seed=1, overwrite=True)["tokens_per_second"]
    for name in ("samples.jsonl", "run.json"):
        assert (tmp_path / "used" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert run(tmp_path / "used", tiny=tiny, seed=1, overwrite=True)["tokens_per_second"] is None


def test_a_file_this_run_did_not_write_is_refused_by_line(tmp_path, tiny):
    run(tmp_path, tiny=tiny)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, damaged in (
        (3, [*lines[:2], lines[0], *lines[3:]]),
        (5, [*lines[:4], b"{\n", *lines[5:]]),
        (19, [*lines, lines[0]]),
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=f"samples.jsonl, line {number}"):
            run(tmp_path, tiny=tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"template": "no place"}, "no {prompt}"),
        ({"max_new_tokens": 60}, "problem 'long': 6 prompt tokens and 60 new ones exceed the 64 positions"),
        ({"problems": [Problem("day", "4+5=", "Monday")]}, "problem 'day': .*has no number"),
        ({"problems": [Problem("empty", "", "4")]}, "problem 'empty': .*no tokens"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


def test_a_model_that_gives_nan_is_refused_by_problem(tmp_path, tiny):
    tiny[0].model.norm.weight.data[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="problem 'long': the model gives NaN"):
            run(tmp_path / str(temperature), tiny=tiny, decoding=Decoding(temperature=temperature))


def test_a_run_that_failed_before_its_first_sample_is_started_anew_with_other_settings(tmp_path, tiny):
    with pytest.raises(UserError, match="exceed the 64 positions"):
        run(tmp_path, tiny=tiny, max_new_tokens=60)
    assert run(tmp_path, tiny=tiny)["samples"] == 18


def test_a_full_disk_is_the_users_to_mend_and_the_run_goes_on_to_the_same_bytes(tmp_path, tiny):
    run(tmp_path / "whole", tiny=tiny)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, limits[1]))
    try:
        with pytest.raises(UserError, match="full: File too large; make room"):
            run(tmp_path / "full", tiny=tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(tmp_path / "full", tiny=tiny)
    assert (tmp_path / "full" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_a_verifier_that_gives_up_is_counted(tmp_path):
    def tired(completion: str, reference: str) -> Verdict:
        return Verdict(False, None, gave_up=True)

    result = run(tmp_path, verifier=tired)
    assert (result["gave_up"], result["correct"]) == (18, 0.0)


def test_the_command_samples_a_saved_model(saved, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([str(part) for part in [*saved, "--n", "6", "--out", tmp_path / "cli"]])
    assert "3 problems, 18 samples" in capsys.readouterr().out
    run(tmp_path / "api")
    assert (tmp_path / "cli" / "samples.jsonl").read_bytes() == (tmp_path / "api" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("device", ["meta", "tape", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused(saved, tmp_path, capsys, device):
    with pytest.raises(SystemExit) as status:
        cli.main([str(part) for part in [*saved, "--out", tmp_path / "out", "--device", device]])
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith(f"wiseft: --device {device} cannot be used here: ")


def test_vllm_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    (tmp_path / "problems.jsonl").write_text('{"question": "1+2=", "answer": "3"}')
    with pytest.raises(UserError, match="--engine vllm needs vLLM"):
        Sample(model="m", problems=tmp_path / "problems.jsonl", out=tmp_path, verifier="gsm8k", engine="vllm").run()
