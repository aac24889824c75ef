import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.directions import Directions

peft = pytest.importorskip("peft")


def adapted(tmp_path, modules=("o_proj", "down_proj"), seed=0, **options):
    """A base, a peft adapter of it with random factors, and the merged model, on disk."""
    model = tiny_llama(vocab_size=50, hidden_size=32, tie=False)
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[*modules], **{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.copy_(0.01 * torch.randn(one.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"o_proj": 20}, "rank_pattern": {"model.layers.1.mlp.down_proj": 7}}],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_has_the_directions_of_the_merged_difference(tmp_path, options):
    base, adapter, merged = adapted(tmp_path, **options)
    exact, full = Directions.of_adapter(adapter, k=6, base=base), Directions.of(base, merged, k=6)
    assert exact.source == {"method": "adapter", "post": "adapter", "base": "base"}
    assert [one.label for one in exact.writers] == [one.label for one in full.writers]
    for one, other in zip(exact.writers, full.writers, strict=True):
        rank = 6 if options.get("rank_pattern") and one.label == "D1" else 4
        assert (one.method, one.signal, other.signal, len(one.sigma)) == ("exact", rank, rank, rank)
        assert one.name == other.name
        torch.testing.assert_close(torch.tensor(one.sigma), torch.tensor(other.sigma[:rank]), rtol=1e-4, atol=0)
        torch.testing.assert_close(one.vectors, other.vectors[:rank], rtol=0, atol=1e-3)
        if rank == 4:
            assert one.norm == pytest.approx(other.norm, rel=1e-5)
        assert not any(one.residuals)


def test_without_its_base_an_adapter_is_read_by_names(tmp_path):
    base, adapter, _ = adapted(tmp_path, modules=("q_proj", "o_proj", "up_proj", "down_proj"))
    with pytest.warns(UserWarning, match="without the base model, its residual writers were told by their names"):
        alone = Directions.of_adapter(adapter)
    with_base = Directions.of_adapter(adapter, base=base)
    assert [one.name for one in alone.writers] == [one.name for one in with_base.writers]
    assert all(torch.equal(one.vectors, other.vectors) for one, other in zip(alone.writers, with_base.writers, strict=True))
    assert alone.detected
    assert not with_base.detected
    assert alone.blocks == with_base.blocks


def test_transposed_layers_have_the_output_side_of_their_factors(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_proj"], r=2, lora_alpha=0.2, fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    exact = Directions.of_adapter(tmp_path / "adapter", base=tmp_path / "base")
    full = Directions.of(tmp_path / "base", tmp_path / "merged", k=2)
    for one, other in zip(exact.writers, full.writers, strict=True):
        assert (one.label, one.shape) == (other.label, other.shape)
        torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=1e-4)


def test_separate_experts_of_a_layer_make_one_exact_writer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors, whole = {}, []
    for e in range(3):
        a, b = torch.randn(2, 12, generator=generator), torch.randn(16, 2, generator=generator)
        name = f"base_model.model.model.layers.0.mlp.experts.{e}.down_proj"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        whole.append(3 * b @ a)
    folder = written(tmp_path / "adapter", tensors, {"peft_type": "LORA", "lora_alpha": 6})
    with pytest.warns(UserWarning, match="told by their names"):
        (one,) = Directions.of_adapter(folder).writers
    u, sigma, _ = torch.linalg.svd(torch.cat(whole, dim=1).double())
    torch.testing.assert_close(torch.tensor(one.sigma, dtype=torch.float64), sigma[:6], rtol=1e-6, atol=0)
    torch.testing.assert_close((one.vectors.double() @ u[:, :6]).diagonal().abs(), torch.ones(6, dtype=torch.float64))


def test_an_untrained_adapter_has_no_signal(tmp_path):
    base, adapter, _ = adapted(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: one * ("lora_A" in name) for name, one in tensors.items()}, adapter / "adapter_model.safetensors")
    assert Directions.of_adapter(adapter, base=base).signal == 0


def written(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "is DoRA: only plain LoRA can be read"),
        ({"peft_type": "IA3"}, "is IA3: only plain LoRA can be read"),
        ({"init_lora_weights": "pissa"}, "was started by pissa, which changes the base too"),
        ({"lora_alpha": None}, "adapter_config.json has lora_alpha None, not a finite number"),
        ({"lora_alpha": math.nan}, "has lora_alpha nan"),
        ({"alpha_pattern": {"o_proj": "8"}}, "has o_proj '8'"),
        ({"target_parameters": ["experts.down_proj"]}, "has target_parameters"),
    ],
)
def test_other_adapters_are_errors(tmp_path, change, message):
    _, adapter, _ = adapted(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        Directions.of_adapter(adapter)


def test_broken_factors_are_errors_that_name_the_tensor(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    other = name.replace("lora_A", "lora_B")
    config = {"peft_type": "LORA", "lora_alpha": 6}
    cases = {
        "alone": ({name: torch.ones(2, 8)}, "has tensor .*lora_A.weight but no .*lora_B.weight"),
        "ranks": ({name: torch.ones(2, 8), other: torch.ones(8, 3)}, "lora_A.weight has rank 2, .*lora_B.weight has rank 3"),
        "nan": ({name: torch.full((2, 8), math.nan), other: torch.ones(8, 2)}, "lora_A.weight holds NaN or infinity"),
        "none": (
            {name.replace("o_proj", "q_proj"): torch.ones(2, 8), other.replace("o_proj", "q_proj"): torch.ones(8, 2)},
            "no matrix",
        ),
        "scalar": ({name: torch.ones(2, 8), other: torch.ones(())}, r"lora_B.weight is \[\], not a matrix"),
        "ints": (
            {name: torch.ones(2, 8, dtype=torch.int8), other: torch.ones(8, 2)},
            "is I8: save the adapter in a floating-point dtype",
        ),
    }
    for case, (tensors, message) in cases.items():
        with pytest.raises(UserError, match=message):
            Directions.of_adapter(written(tmp_path / case, tensors, config))


def test_a_model_in_the_place_of_an_adapter_is_told_of(tmp_path):
    base, _, _ = adapted(tmp_path)
    with pytest.raises(UserError, match=r"is no adapter of peft: it has no adapter_config\.json"):
        Directions.of_adapter(base)


def test_tensors_that_are_not_read_are_warnings(tmp_path):
    base, adapter, _ = adapted(tmp_path, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="replaces whole tensors, such as .*lm_head"):
        Directions.of_adapter(adapter, base=base)
