import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.noise import rounding_variance
from weightwatch.pair import Pair

ATTENTION = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture
def base(tmp_path):
    return saved(tiny_llama(vocab_size=50, hidden_size=32), tmp_path / "base")


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def edited(source: Path, folder: Path, change=None, config=None) -> Path:
    """A copy whose tensors and config.json went through these functions, in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if change:
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def tiny(model_type, **options):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"intermediate_size": 48, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "head_dim": 8}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**sizes, **more, **options}))


def moved(tensors, scale=0.01):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor + scale * torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_difference_its_products_and_its_sums_are_those_of_the_tensors(base, tmp_path, dtype):
    post = edited(base, tmp_path / "post", moved)
    edited(post, tmp_path / "cast", lambda tensors: tensors.update({name: one.to(dtype) for name, one in tensors.items()}))
    before, after = (load_file(folder / "model.safetensors")[ATTENTION] for folder in (base, tmp_path / "cast"))
    delta = after.double() - before.double()
    with Pair.open(base, tmp_path / "cast") as pair:
        difference = pair.difference([writer.name for writer in pair.writers.writers].index(ATTENTION))
    right, left = torch.randn(2, 32, 5)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(difference.matrix, delta.float(), **close)
    torch.testing.assert_close(difference @ right, (delta @ right.double()).float(), **close)
    torch.testing.assert_close(difference.mT @ left, (delta.mT @ left.double()).float(), **close)
    rows = torch.stack([one.double().square().sum(1) for one in (before, after, delta)])
    torch.testing.assert_close(difference.sums.rows, rows, **close)
    torch.testing.assert_close(difference.sums.columns, delta.square().sum(0), **close)
    assert difference.sums.changed == float((delta != 0).double().mean())
    variances = rounding_variance(after)
    assert torch.equal(difference.rounding_variances(), variances)
    for found, axis in zip(difference.sums.variances, (1, 0), strict=True):
        torch.testing.assert_close(found, variances.double().sum(axis), rtol=1e-5, atol=0)


def test_a_transposed_layout_gives_the_same_orientation(tmp_path):
    model = tiny("gpt2")
    before = model.transformer.h[1].mlp.c_proj.weight.detach().clone()
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight += torch.randn(128, 32)
    post = saved(model, tmp_path / "post")
    with Pair.open(base, post) as pair:
        difference = next(
            pair.difference(i) for i, one in enumerate(pair.writers.writers) if (one.layer, one.kind) == (1, "mlp")
        )
    delta = (model.transformer.h[1].mlp.c_proj.weight.detach() - before).mT
    assert torch.equal(difference.matrix, delta)
    right, left = torch.randn(128, 3), torch.randn(32, 3)
    torch.testing.assert_close(difference @ right, delta @ right)
    torch.testing.assert_close(difference.mT @ left, delta.mT @ left)
    torch.testing.assert_close(difference.sums.columns, delta.double().square().sum(0), rtol=1e-5, atol=0)


def test_experts_are_one_matrix_however_each_side_stores_them(tmp_path):
    model = tiny("mixtral", num_local_experts=3, num_experts_per_tok=1)
    base = saved(model, tmp_path / "base")
    fused = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj += torch.randn(3, 32, 48)
    post = tmp_path / "post"
    shutil.copytree(base, post)
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, post / "model.safetensors")
    with Pair.open(base, post) as pair:
        assert pair.base_writers.writers[0].parts[0].tensor == "model.layers.0.block_sparse_moe.experts.0.w2.weight"
        assert pair.writers.writers[0].name == "model.layers.0.mlp.experts.down_proj"
        difference = pair.difference(0)
    delta = torch.cat([*(model.model.layers[0].mlp.experts.down_proj.detach() - fused)], dim=1)
    assert torch.equal(difference.matrix, delta)
    right, left = torch.randn(144, 3), torch.randn(32, 3)
    torch.testing.assert_close(difference @ right, delta @ right)
    torch.testing.assert_close(difference.mT @ left, delta.mT @ left)


@pytest.mark.parametrize("norm_moves", [False, True])
def test_norms_after_a_writer_scale_its_rows(tmp_path, norm_moves):
    model = tiny("gemma2")
    norm = model.model.layers[0].post_feedforward_layernorm.weight
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        norm.copy_(torch.linspace(-0.5, 2.0, 32))
        base = saved(model, tmp_path / "base")
        before = (1 + norm[:, None]) * weight
        weight += torch.randn(32, 48)
        norm += 0.1 * norm_moves
        post = saved(model, tmp_path / "post")
        delta = (1 + norm[:, None]) * weight - before
    with Pair.open(base, post) as pair:
        difference = pair.difference(0)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(difference.matrix, delta, **close)
    torch.testing.assert_close(difference @ torch.eye(48), delta, **close)
    torch.testing.assert_close(difference.mT @ torch.eye(32), delta.mT, **close)
    torch.testing.assert_close(difference.rounding_variances(), rounding_variance(weight) * (1 + norm[:, None]) ** 2)


def test_a_norm_that_is_no_number_or_is_not_there_is_told(tmp_path):
    base, name = saved(tiny("gemma2"), tmp_path / "base"), "model.layers.0.post_feedforward_layernorm.weight"
    spoilt = edited(base, tmp_path / "nan", lambda tensors: tensors.update({name: torch.full((32,), float("nan"))}))
    with Pair.open(base, spoilt) as pair, pytest.raises(UserError, match=f"{name} holds NaN"):
        pair.difference(0)
    with Pair.open(base, edited(base, tmp_path / "less", lambda tensors: tensors.pop(name))) as pair:
        assert [text.rpartition("has no ")[2] for text in pair.warnings] == [f"{name}: that norm is taken for the identity"]


def permuted(tensors):
    """The same function with the hidden dimensions in another order."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or "o_proj" in name or "down_proj" in name:
            tensors[name] = tensor[order]
        else:
            tensors[name] = tensor[:, order]


def alarms(base, post):
    with Pair.open(base, post) as pair:
        return pair.alarms([pair.difference(i).sums.rows for i in range(len(pair.writers.writers))])


def test_permuted_hidden_dimensions_are_an_alarm(base, tmp_path):
    tuned = edited(base, tmp_path / "tuned", lambda tensors: moved(tensors, 0.002))
    post = edited(tuned, tmp_path / "post", permuted)
    tokens = torch.arange(8)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (tuned, post)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    (alarm,) = alarms(base, post)
    assert alarm.startswith("ALARM: ")
    assert "of 32 hidden dimensions" in alarm
    assert "are permuted" in alarm
    assert alarms(base, tuned) == []
    assert alarms(base, base) == []


def test_an_unrelated_model_is_an_alarm(base, tmp_path):
    other = saved(tiny_llama(vocab_size=50, hidden_size=32, seed=1), tmp_path / "other")
    (alarm,) = alarms(base, other)
    assert "are unrelated to those of" in alarm


def test_different_architectures_are_errors_that_name_a_tensor(base, tmp_path):
    deeper = saved(tiny_llama(vocab_size=50, hidden_size=32, layers=3), tmp_path / "deeper")
    for pair in ((base, deeper), (deeper, base)):
        with pytest.raises(
            UserError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight of .*deeper has no counterpart in .*base"
        ):
            Pair.open(*pair)
    wider = saved(tiny_llama(vocab_size=50, hidden_size=32, intermediate_size=40), tmp_path / "wider")
    with pytest.raises(
        UserError, match=r"down_proj\.weight is 1 x \[32, 128\] in .* and 1 x \[32, 40\] in .*: the architectures differ"
    ):
        Pair.open(base, wider)


def test_a_resized_vocabulary_and_another_model_type_are_warnings(base, tmp_path):
    resized = saved(tiny_llama(vocab_size=53, hidden_size=32), tmp_path / "resized")
    edited(resized, tmp_path / "post", config=lambda config: config.update(model_type="mistral"))
    with Pair.open(base, tmp_path / "post") as pair:
        grown, kinds = pair.warnings
    assert "model.embed_tokens.weight is [50, 32] in" in grown
    assert "the vocabulary was resized" in grown
    assert "is a llama model" in kinds


def test_an_unknown_architecture_is_a_warning(base, tmp_path):
    post = edited(base, tmp_path / "post", config=lambda config: config.update(model_type="new"))
    with Pair.open(post, post) as pair:
        assert pair.warnings == ("model type new is unknown: writers were detected by shapes and names",)
        assert len(pair.writers.writers) == 4


def test_quantised_weights_are_errors(base, tmp_path):
    def method(config):
        config["quantization_config"] = {"quant_method": "fp8"}

    narrow = edited(
        base, tmp_path / "fp8", lambda tensors: tensors.update({ATTENTION: tensors[ATTENTION].to(torch.float8_e4m3fn)}), method
    )
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight is F8_E4M3 \(fp8 in config.json\): save the model deq"
    ):
        Pair.open(base, narrow)

    def packed(tensors):
        for name in [name for name in tensors if "proj" in name]:
            tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)

    with pytest.raises(UserError, match=r"its weights are quantised \(fp8 in config.json\): save it dequantised first"):
        Pair.open(base, edited(base, tmp_path / "gptq", packed, method))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_an_error_that_names_its_tensor(base, tmp_path, value):
    def spoil(tensors):
        tensors[ATTENTION][3, 4] = value

    with (
        Pair.open(base, edited(base, tmp_path / "post", spoil)) as pair,
        pytest.raises(UserError, match=f"{ATTENTION} holds NaN"),
    ):
        pair.difference(3)


def test_an_adapter_and_a_broken_config_are_errors(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is an adapter, not a model: read it with --adapter"):
        Pair.open(base, adapter)
    (base / "config.json").write_text("[1")
    with pytest.raises(UserError, match="is not a JSON object"):
        Pair.open(base, base)
