import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lmcore import random
from lmcore.errors import UserError
from lmcore.models import smollm2_folder, tiny_llama
from weightwatch.directions import Directions

PLANTED = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_llama(vocab_size=50, hidden_size=64, layers=3).save_pretrained(folder)
    return folder


def unit(size, name):
    return torch.nn.functional.normalize(random.normal(0, name, size), dim=0)


U, V = unit(64, "u"), unit(64, "v")


def tuned(source, folder, changes, dtype=None):
    """A copy with these tensors added to weights, stored in another dtype."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = tensors[name] + change
    save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_planted_direction_is_found_and_all_else_is_noise(base, tmp_path, dtype):
    """The base is float32: cast to 16 bits, every other weight differs by its rounding."""
    post = tuned(base, tmp_path / "post", {PLANTED: 0.1 * torch.outer(U, V)}, dtype)
    directions = Directions.of(base, post)
    for one in directions.writers:
        assert one.signal == one.structured == (one.label == "O1"), one.label
        assert all(value <= one.edge for value in one.sigma[one.signal :])
        assert len(one.sigma) == 20
    found = next(one for one in directions.writers if one.label == "O1")
    assert abs(found.vectors[0] @ U) > 0.999
    assert found.sigma[0] == pytest.approx(0.1, rel=1e-2)
    assert found.stable_rank == pytest.approx(1, abs=0.05)
    assert directions.stack(drop_last=0).labels == (("O1_u0",),)
    assert directions.warnings == ()


def test_equal_checkpoints_have_no_signal(base, tmp_path):
    directions = Directions.of(base, base)
    assert directions.signal == 0
    assert all(one.changed == one.norm == one.stable_rank == 0 for one in directions.writers)
    with pytest.raises(UserError, match="the first 3 of 3 blocks have no direction above the noise edge"):
        directions.stack(drop_last=0)
    narrow = tuned(base, tmp_path / "narrow", {}, torch.bfloat16)
    assert Directions.of(narrow, tuned(narrow, tmp_path / "wide", {}, torch.float32)).signal == 0


def test_noise_above_rounding_is_signal_but_not_structured(base, tmp_path):
    noise = {
        f"model.layers.{i}.mlp.down_proj.weight": 1e-3 * random.normal(0, f"{i}", 64 * 256).view(64, 256) for i in range(3)
    }
    directions = Directions.of(base, tuned(base, tmp_path / "post", noise))
    assert directions.signal == 3 * 20
    assert not any(one.structured for one in directions.writers)


def test_a_direction_is_found_where_rounding_left_most_weights_as_they_were(tmp_path):
    """A light fine-tune of a bfloat16 model, under the edge of rounding errors that are there in full."""
    tiny_llama(vocab_size=50, hidden_size=64, layers=1, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    change = 1.2e-3 * torch.outer(U, unit(256, "w"))
    weight = load_file(tmp_path / "base" / "model.safetensors")[name]
    post = tuned(tmp_path / "base", tmp_path / "post", {name: (weight.float() + change).bfloat16() - weight})
    one = Directions.of(tmp_path / "base", post).writers[0]
    assert one.changed < 0.2
    assert one.signal >= 1
    assert abs(one.vectors[0] @ U) > 0.8


def test_labels_layers_and_banks_are_in_the_order_of_the_paper(base, tmp_path):
    changes = {PLANTED: 0.2 * torch.outer(U, V) + 0.1 * torch.outer(unit(64, "a"), unit(64, "b"))}
    changes["model.layers.0.mlp.down_proj.weight"] = 0.1 * torch.outer(unit(64, "c"), unit(256, "d"))
    directions = Directions.of(base, tuned(base, tmp_path / "post", changes), k=3)
    assert directions.labels == [f"{kind}{layer}_u{i}" for layer in range(3) for kind in "DO" for i in range(3)]
    assert torch.equal(directions.layer(1), torch.cat([one.vectors for one in directions.writers[2:4]]))
    assert directions.layer(7).shape == (0, 64)
    bank = directions.stack(drop_last=1)
    assert (bank.layers, bank.blocks) == ((0, 1), ("model.layers.0", "model.layers.1"))
    assert bank.labels == (("D0_u0",), ("O1_u0", "O1_u1"))
    assert bank.counts == (1, 2)
    assert bank.vectors.shape == (2, 2, 64)
    assert torch.equal(bank.vectors[1], directions.writers[3].vectors[:2])
    assert not bank.vectors[0, 1].any()
    assert bank.sigma[1] == directions.writers[3].sigma[:2]
    assert directions.stack(1, drop_last=1).labels == (("D0_u0",), ("O1_u0",))
    assert directions.stack(signal_only=False, drop_last=0).vectors.shape == (3, 6, 64)
    assert directions.stack(drop_last=2).layers == (0,)
    with pytest.raises(UserError, match="the first 0 of 3 blocks"):
        directions.stack()


def test_what_is_saved_is_loaded_and_damage_is_seen(base, tmp_path):
    directions = Directions.of(base, tuned(base, tmp_path / "post", {PLANTED: torch.outer(U, V)}), k=4)
    directions.save(tmp_path / "out")
    loaded = Directions.load(tmp_path / "out")
    assert loaded.digest == directions.digest
    assert loaded == replace(directions, writers=loaded.writers)
    for one, other in zip(loaded.writers, directions.writers, strict=True):
        assert torch.equal(one.vectors, other.vectors)
        assert replace(one, vectors=other.vectors) == other
    with pytest.raises(UserError, match="exists: pass --overwrite"):
        directions.save(tmp_path / "out")
    directions.save(tmp_path / "out", overwrite=True)
    assert directions.digest != Directions.of(base, base, k=4).digest

    facts = json.loads((tmp_path / "out" / "directions.json").read_text())
    facts["writers"][0]["edge"] = 7.0
    (tmp_path / "out" / "directions.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="do not belong together, or one was edited"):
        Directions.load(tmp_path / "out")
    (tmp_path / "out" / "directions.json").write_text("{}")
    with pytest.raises(UserError, match="holds no directions"):
        Directions.load(tmp_path / "out")
    with pytest.raises(UserError, match="holds no directions"):
        Directions.load(tmp_path / "nothing")


def test_the_bits_do_not_depend_on_the_number_of_threads(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = [name for name in load_file(base / "model.safetensors") if "o_proj" in name]
    post = tuned(base, tmp_path / "post", {name: 0.01 * torch.randn(64, 64, generator=generator) for name in names})
    digests = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        digests.append(Directions.of(base, post, k=2).digest)
        assert torch.get_num_threads() == count
    assert len(set(digests)) == 1


def test_more_directions_than_a_matrix_has_are_all_it_has(base, tmp_path):
    directions = Directions.of(base, tuned(base, tmp_path / "post", {PLANTED: torch.outer(U, V)}), k=1000)
    assert {len(one.sigma) for one in directions.writers} == {64}
    assert directions.signal == 1


def test_raw_directions_are_those_of_the_weights(base, tmp_path):
    post = tuned(base, tmp_path / "post", {PLANTED: 2 * torch.outer(U, V)})
    directions = Directions.raw(post, k=5)
    assert directions.source == {"method": "raw", "post": "post"}
    assert [one.signal for one in directions.writers] == [0, 0, 0, 1, 0, 0]  # initial weights have no order
    assert abs(directions.writers[3].vectors[0] @ U) > 0.99
    assert directions.writers[0].base_norm is None


def test_permuted_hidden_dimensions_are_a_warning_that_is_kept(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    changes = {name: one[order] - one for name, one in tensors.items() if "o_proj" in name or "down_proj" in name}
    with pytest.warns(UserWarning, match="ALARM: .* are permuted"):
        directions = Directions.of(base, tuned(base, tmp_path / "post", changes))
    assert directions.warnings[0].startswith("ALARM")
    directions.save(tmp_path / "out")
    assert Directions.load(tmp_path / "out").warnings == directions.warnings


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory):
    """The first layers of SmolLM2 and a fine-tune of them: 30 directions of falling size in each matrix, rounded to bfloat16."""
    base, post = (tmp_path_factory.mktemp("smollm2") / name for name in ("base", "post"))
    tensors = load_file(smollm2_folder() / "model.safetensors")
    tensors = {name: one for name, one in tensors.items() if re.search(r"layers\.[01]\.", name)}
    for folder in (base, post):
        folder.mkdir()
        config = json.loads((smollm2_folder() / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    save_file(tensors, base / "model.safetensors")
    for name, one in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            left, right = (random.normal(0, f"{name} {side}", 30 * one.shape[side]).view(30, -1) for side in (0, 1))
            change = (left.mT * (0.006 / torch.arange(1, 31))) @ right / one.shape[1] ** 0.5
            tensors[name] = (one.float() + change).bfloat16()
    save_file(tensors, post / "model.safetensors")
    return base, post


def test_real_weights_give_the_exact_subspace_above_the_edge(few_layers):
    base, post = few_layers
    directions = Directions.of(base, post)
    torch.set_num_threads(1)
    before, after = (load_file(folder / "model.safetensors") for folder in few_layers)
    for one in directions.writers:
        assert one.method == "krylov"
        delta = after[one.name].double() - before[one.name].double()
        squares, u = torch.linalg.eigh(delta @ delta.mT)
        sigma, u, n = squares.flip(0).sqrt(), u.flip(1), one.signal
        assert 5 < n <= 20
        assert ((one.vectors[:n].double() @ u[:, :n]) ** 2).sum() / n > 0.999
        error = (torch.tensor(one.sigma, dtype=torch.float64) - sigma[:20]).abs()
        assert (error <= torch.tensor(one.residuals, dtype=torch.float64) + 1e-6 * sigma[0]).all()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_memory_is_that_of_a_few_matrices(tmp_path):
    layers, d, m = 24, 256, 2048
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": (d, m) for i in range(layers)}
    for name in ("base", "post"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": d}))
        weights = {
            tensor: random.normal(0, f"{tensor} {name == 'base'}", d * m).view(shape) for tensor, shape in shapes.items()
        }
        save_file(weights, tmp_path / name / "model.safetensors")
        del weights
    torch.set_num_threads(1)
    for _ in range(2):  # the first time, libraries take memory of their own
        Path("/proc/self/clear_refs").write_text("5")
        start = peak()
        with pytest.warns(UserWarning, match="unrelated"):
            Directions.of(tmp_path / "base", tmp_path / "post", k=2)
        grown = peak() - start
    assert grown < 12 * 4 * d * m, f"two matrices, in float32 and in float64, and a few columns: not {layers} of each"


def peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
