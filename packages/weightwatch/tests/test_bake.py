import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmcore import cli
from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.bake import bake
from weightwatch.bake_command import Bake
from weightwatch.directions import Directions

WEIGHT = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tune with one direction planted in each of two writers, and their directions."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(vocab_size=30, hidden_size=64)
    model.save_pretrained(folder / "base")
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for weight in (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            u, v = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in weight.shape)
            weight += 0.2 * torch.outer(u, v)
    model.save_pretrained(folder / "post")
    Directions.of(folder / "base", folder / "post", k=2).save(folder / "directions")
    return folder


def test_reverting_a_planted_direction_gives_the_base_back(models, tmp_path):
    directions = Directions.load(models / "directions")
    result = bake(directions, models / "post", tmp_path / "out", ["O1_u0", "D0_u0"], base=models / "base")
    base, baked = (AutoModelForCausalLM.from_pretrained(folder) for folder in (models / "base", tmp_path / "out"))
    for (name, one), (_, other) in zip(base.named_parameters(), baked.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)
    assert result["tensors"].keys() == {WEIGHT, "model.layers.0.mlp.down_proj.weight"}
    assert result["tensors"][WEIGHT]["lost"] < 1e-8


def test_reverting_one_direction_leaves_every_other_tensor_as_it_was_byte_for_byte(models, tmp_path):
    bake(Directions.load(models / "directions"), models / "post", tmp_path / "out", ["O1_u0"], base=models / "base")
    with Checkpoint.open(models / "post") as post, Checkpoint.open(tmp_path / "out") as baked:
        differ = [name for name in post.tensors if (post.read(name) != baked.read(name)).any()]
    assert differ == [WEIGHT]


def test_after_removal_a_block_writes_nothing_along_the_direction(models, tmp_path):
    directions = Directions.load(models / "directions")
    bake(directions, models / "post", tmp_path / "out", ["O1_u0", "O1_u1", "D1_u0"], mode="remove")
    with Checkpoint.open(tmp_path / "out") as baked:
        rows = [one.vectors for one in directions.writers if one.layer == 1]
        chosen = torch.stack([*next(one.vectors for one in directions.writers if one.label == "O1"), rows[0][0]])
        for name in (WEIGHT, "model.layers.1.mlp.down_proj.weight"):
            assert (chosen @ baked.tensor(name)).abs().max() < 1e-6
            assert baked.tensor(name).norm() > 0.5


def test_biases_and_transposed_weights_of_gpt2_are_projected_too(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.bias.normal_()
    model.save_pretrained(tmp_path / "post")
    directions = Directions.raw(tmp_path / "post", k=1)
    bake(directions, tmp_path / "post", tmp_path / "out", ["O0_u0"], mode="remove")
    (u,) = next(one.vectors for one in directions.writers if one.kind == "attention")
    baked = GPT2LMHeadModel.from_pretrained(tmp_path / "out").transformer.h[0]
    for layer in (baked.attn.c_proj, baked.mlp.c_proj):
        assert (layer.weight @ u).abs().max() < 1e-6  # [inputs, outputs]
        assert abs(layer.bias @ u) < 1e-6


def test_the_command_says_what_moved_and_bad_choices_are_refused(models, tmp_path, capsys):
    arguments = ["bake", str(models / "directions"), str(models / "post"), "O1_u0", "--out", str(tmp_path / "out")]
    both = [Bake, type("Again", (Bake,), {})]
    assert cli.main("weightwatch", "", both, arguments) == 2
    assert "--base" in capsys.readouterr().err
    assert cli.main("weightwatch", "", both, [*arguments, "--base", str(models / "base")]) == 0
    assert WEIGHT in capsys.readouterr().out
    assert json.loads((tmp_path / "out/weightwatch.json").read_text())["directions"] == ["O1_u0"]
    assert cli.main("weightwatch", "", both, [*arguments, "--mode", "remove"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    directions = Directions.load(models / "directions")
    with pytest.raises(UserError, match="O9_u0"):
        bake(directions, models / "post", tmp_path / "new", ["O9_u0"], mode="remove")
    with pytest.raises(UserError, match="write into"):
        bake(directions, models / "post", models / "post" / "inside", ["O1_u0"], mode="remove")
    tiny_llama(vocab_size=30, hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="64 entries"):
        bake(directions, tmp_path / "other", tmp_path / "new", ["O1_u0"], mode="remove")
    tiny_llama(vocab_size=30, hidden_size=64, layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="lacks blocks"):
        bake(directions, tmp_path / "short", tmp_path / "new", ["D0_u0", "O1_u0"], mode="remove")
    assert not (tmp_path / "new").exists()
