import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore import cli
from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.report import Page
from lmcore.text import character_tokenizer
from weightwatch.diff import diff
from weightwatch.diff_command import Diff
from weightwatch.diff_report import direction_rows, write_page
from weightwatch.directions import Directions
from weightwatch.lens import words

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama whose tokens have orthogonal embeddings, so that a direction can be one token's."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny_llama(vocab_size=30, hidden_size=64), character_tokenizer(LETTERS)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.linalg.qr(torch.randn(64, 30, generator=torch.manual_seed(0))).Q.mT)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fine_tuned(base, folder, change):
    """A copy of `base` whose model went through `change`, saved in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.bfloat16().save_pretrained(folder)
    shutil.copy(base / "tokenizer.json", folder)
    return folder


def plant_a_word(model):
    """Layer 1's attention writes the letter q where its input has its first coordinate."""
    embedding = model.model.embed_tokens.weight
    model.model.layers[1].self_attn.o_proj.weight[:, 0] += 0.1 * embedding[4 + LETTERS.index("q")]


def test_the_words_of_a_planted_direction_are_the_planted_ones(base, tmp_path):
    post = fine_tuned(base, tmp_path / "post", plant_a_word)
    found = diff(str(base), str(post))
    (label,) = found.words
    assert label == "O1_u0"
    assert found.grade == "marked"
    ends = [(end[0][0], abs(end[0][1])) for end in (found.words[label].high, found.words[label].low)]
    assert max(ends, key=lambda end: end[1])[0] == "q"


def test_a_copy_is_identical_and_a_rounded_nudge_below_rounding(base, tmp_path):
    assert diff(str(base), str(base)).grade == "identical"
    generator = torch.manual_seed(0)

    def nudge(model):
        for block in model.model.layers:
            weight = block.mlp.down_proj.weight
            weight += torch.randn(weight.shape, generator=generator) * weight.abs() * 2**-10

    found = diff(str(base), str(fine_tuned(base, tmp_path / "post", nudge)))
    assert (found.grade, found.directions.signal) == ("below rounding", 0)
    assert any(one.changed for one in found.directions.writers)


def test_spread_out_and_low_rank_differences_are_told_apart(base, tmp_path):
    generator = torch.manual_seed(0)

    def spread(model):
        for block in model.model.layers:
            for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
                weight += torch.randn(weight.shape, generator=generator) * 0.004

    def adapt(model):
        for block in model.model.layers:
            for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
                rank = 4
                weight += (
                    torch.randn(len(weight), rank, generator=generator)
                    @ torch.randn(rank, weight.shape[1], generator=generator)
                    * 0.002
                )

    assert diff(str(base), str(fine_tuned(base, tmp_path / "spread", spread)), k=8).grade == "spread out"
    assert diff(str(base), str(fine_tuned(base, tmp_path / "adapted", adapt)), k=8).grade == "low rank"


def test_tensors_that_do_not_write_to_the_stream_are_told_of(base, tmp_path):
    def change(model):
        model.model.layers[0].mlp.up_proj.weight[3] += 1.0

    found = diff(str(base), str(fine_tuned(base, tmp_path / "post", change)))
    assert [one.name for one in found.others] == ["model.layers.0.mlp.up_proj.weight"]
    assert 0 < found.others[0].changed < 0.01
    assert found.grade == "below rounding"


def test_a_tensor_of_one_model_alone_is_told_of_and_is_no_copy(base, tmp_path):
    post = shutil.copytree(base, tmp_path / "post")
    tensors = load_file(post / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(3)}, post / "model.safetensors", {"format": "pt"})
    for pair in ((base, post), (post, base)):
        with pytest.warns(UserWarning, match=r"1 tensors, such as model\.extra, are in one model alone"):
            found = diff(*map(str, pair))
        assert found.grade == "below rounding"
        assert "model.extra" in found.as_json()["warnings"][-1]


def test_numbers_that_are_none_are_errors_and_a_broken_tokenizer_costs_the_words_alone(base, tmp_path):
    nan = shutil.copytree(base, tmp_path / "nan")
    tensors = load_file(nan / "model.safetensors")
    tensors["model.norm.weight"][1] = torch.nan
    save_file(tensors, nan / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: tensor model\.norm\.weight holds NaN or infinity"):
        diff(str(base), str(nan))

    post = fine_tuned(base, tmp_path / "post", plant_a_word)
    (post / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match=r"tokenizer\.json is no tokenizer \(.*\): there are no words"):
        found = diff(str(base), str(post))
    assert (found.grade, found.words) == ("marked", {})


def test_the_lens_reads_through_the_gain_and_centres_for_a_layer_norm(tmp_path):
    generator, vectors = torch.manual_seed(0), torch.eye(8)[:3]
    embedding, gain = torch.randn(40, 8, generator=generator), torch.randn(8, generator=generator)
    for norm, model_type, expected in (
        ({"ln_f.weight": gain, "ln_f.bias": torch.ones(8)}, "gpt2", (vectors - 1 / 8) * gain),
        ({"model.norm.weight": gain}, "llama", vectors * gain),
        ({"model.norm.weight": gain}, "gemma", vectors * (1 + gain)),
    ):
        save_file({"wte.weight": embedding, **norm}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with Checkpoint.open(tmp_path / "model.safetensors") as checkpoint:
            found = words(vectors, checkpoint, top=1)
        logits = expected @ embedding.T
        z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
        assert [one.high[0] for one in found] == [
            (f"#{i}", pytest.approx(float(value), abs=2e-3)) for i, value in zip(z.argmax(1).tolist(), z.amax(1), strict=True)
        ]


def test_words_are_those_of_the_largest_logits_whatever_the_length_of_the_direction(base):
    vectors = Directions.raw(str(base), k=2).writers[0].vectors
    with Checkpoint.open(base) as checkpoint:
        plain = words(vectors, checkpoint)
        assert plain == words(vectors * 7, checkpoint)  # z-scores have no scale
        assert plain[0].high[0][0].startswith("#")
        embedding = checkpoint.tensor("model.embed_tokens.weight").double()
    logits = vectors.double() @ embedding.T
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    assert [int(word.high[0][0][1:]) for word in plain] == z.argmax(1).tolist()
    assert plain[0].high[0][1] == pytest.approx(float(z[0].max()), abs=2e-3)


def test_the_command_writes_a_page_and_json_and_prints_words(base, tmp_path, capsys):
    post, out = fine_tuned(base, tmp_path / "post", plant_a_word), tmp_path / "out"
    arguments = ["diff", str(base), str(post), "--out", str(out)]
    assert cli.main("weightwatch", "", [Diff, Again], arguments) == 0
    printed = capsys.readouterr().out
    assert "marked" in printed
    assert "O1_u0" in printed
    assert json.loads((out / "diff.json").read_text())["grade"] == "marked"
    assert "<svg" in (out / "diff.html").read_text()
    assert cli.main("weightwatch", "", [Diff, Again], arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main("weightwatch", "", [Diff, Again], [*arguments, "--overwrite"]) == 0


def test_what_is_read_is_never_written_into(base, tmp_path, capsys):
    post = fine_tuned(base, tmp_path / "post", plant_a_word)
    before = sorted(path.name for path in post.iterdir())
    assert cli.main("weightwatch", "", [Diff, Again], ["diff", str(base), str(post), "--out", str(post), "--overwrite"]) == 2
    assert sorted(path.name for path in post.iterdir()) == before


def test_a_page_without_words_is_written_too(base, tmp_path):
    found = diff(str(base), str(base))
    write_page(found, tmp_path / "page.html")
    assert "No weight differs" in (tmp_path / "page.html").read_text()


def test_the_page_shows_all_layers_and_the_beginning_of_long_tokens(base, tmp_path, monkeypatch):
    found = diff(str(base), str(fine_tuned(base, tmp_path / "post", plant_a_word)))
    figures = []
    monkeypatch.setattr(Page, "figure", lambda _, figure, caption: figures.append(figure))
    write_page(found, tmp_path / "page.html")
    [axes] = figures[0].axes
    first, last = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if first <= tick <= last] == [0, 1]

    said = replace(found.words["O1_u0"], high=(("\n" + " " * 60, 2.0), ("q", 1.0)))
    [row] = direction_rows(replace(found, words={"O1_u0": said}), 1)
    assert row["raises"] == "\\n" + 21 * "␣" + "… q"


class Again(Diff):  # a second command, so that the parser makes subcommands
    """The same command under another name."""
