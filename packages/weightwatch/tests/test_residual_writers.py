import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from weightwatch.residual_writers import LAYOUTS, Writer, residual_writers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "first_k_dense_replace": 1, "n_shared_experts": 2,
}  # fmt: skip
OWN = {
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "t5": {"d_ff": 48, "d_kv": 8},
    "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "deepseek_v3": {"q_lora_rank": None, "kv_lora_rank": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}},
}
ENCODERS = ("bert", "roberta")


def tiny(model_type: str) -> transformers.PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**{**SIZES, **OWN.get(model_type, {})})
    auto = (
        AutoModelForSeq2SeqLM
        if "t5" in model_type
        else AutoModelForMaskedLM
        if model_type in ENCODERS
        else AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config).eval()


def found_in(model):
    return residual_writers({name: tuple(one.shape) for name, one in model.named_parameters()}, model.config.to_dict())


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_layout_names_what_its_architecture_adds_to_the_residual_stream(model_type, tmp_path):
    model = tiny(model_type)
    found = found_in(model)
    assert not found.detected
    assert found.hidden_size == 32
    stacks = 2 if "t5" in model_type else 1
    layers = sum(len(stack) for stack in _stacks(model))
    assert [(one.layer, one.kind) for one in found.writers] == [
        (i, kind) for i in range(layers) for kind in ("mlp", "attention")
    ]
    assert len(found.blocks) == layers >= 2 * stacks
    parameters = dict(model.named_parameters())
    for one in found.writers:
        assert one.shape[0] == 32
        assert all(parameters[norm].shape == (32,) for norm in one.norms)
    if any(part.fused for one in found.writers for part in one.parts):  # files may have the experts one by one
        model.save_pretrained(tmp_path)
        with Checkpoint.open(tmp_path) as checkpoint:
            stored = residual_writers({name: info.shape for name, info in checkpoint.tensors.items()}, model.config.to_dict())
        assert [_parts(one) for one in stored.writers] == [_parts(one) for one in found.writers]
    if model_type not in ENCODERS:  # whose norms are on the stream, so that no direction passes through unturned
        for kind in ("mlp", "attention"):
            _check_that_it_writes(model, found, kind)


def _parts(writer):
    return [(part.expert, part.shape) for part in writer.parts]


def _stacks(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and hasattr(module[0], "forward")
            and type(module[0]).__name__.endswith(("Layer", "Block"))
            and not type(module[0]).__name__.endswith(("LayerFF", "LayerSelfAttention", "LayerCrossAttention"))]  # fmt: skip


@torch.no_grad()
def _check_that_it_writes(model, found, kind):
    """With u vᵀ as the only writer of a block, what its output gains is along u, scaled by the norms on the way."""
    layer = max(found.blocks)
    parameters = dict(model.named_parameters())
    saved = {name: tensor.clone() for name, tensor in parameters.items()}
    u = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for name, tensor in parameters.items():
        if name.startswith(found.blocks[layer]) and name.endswith("bias"):
            tensor.zero_()
    for one in found.writers:
        if one.layer == layer:
            _fill(one, parameters, torch.zeros(32))
            for norm in one.norms:
                parameters[norm].copy_(torch.linspace(-0.5, 0.7, 32))
    before = _output(model, found.blocks[layer])
    mine = next(one for one in found.writers if (one.layer, one.kind) == (layer, kind))
    _fill(mine, parameters, u)
    gained = _output(model, found.blocks[layer]) - before
    scale = torch.ones(32)
    for norm in mine.norms:
        scale = scale * (mine.norm_offset + parameters[norm])
    cosines = torch.nn.functional.cosine_similarity(gained, (scale * u).expand_as(gained), dim=-1)
    assert gained.norm(dim=-1).min() > 1e-6
    torch.testing.assert_close(cosines.abs(), torch.ones_like(cosines), atol=1e-4, rtol=0)
    for name, tensor in parameters.items():
        tensor.copy_(saved[name])


def _fill(writer: Writer, parameters, u):
    for part in writer.parts:
        tensor = parameters[part.tensor]
        target = tensor[part.expert] if part.fused else tensor
        outer = torch.outer(u, torch.linspace(0.5, 1.5, part.shape[1]))
        target.copy_(outer.mT if part.transposed else outer)


def _output(model, block):
    caught = []
    handle = model.get_submodule(block).register_forward_hook(lambda _, __, out: caught.append(out))
    tokens = torch.tensor([[5, 9, 11, 3]])
    model(input_ids=tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
    handle.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


def test_experts_stored_one_by_one_and_fused_are_the_same_parts():
    one_by_one = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (8, 6) for e in range(11)}
    fused = {"model.layers.0.mlp.experts.down_proj": (11, 8, 6)}
    for shapes in (one_by_one, fused):
        (writer,) = residual_writers(shapes, {"model_type": "qwen3_moe", "hidden_size": 8}).writers
        assert [part.expert for part in writer.parts] == list(range(11))
        assert writer.shape == (8, 66)
    assert residual_writers(one_by_one, {"model_type": "qwen3_moe"}).writers[0].name == "model.layers.0.mlp.experts.*"


def test_an_unknown_architecture_is_read_by_its_shapes():
    def block(i):
        return {
            f"net.blocks.{i}.attn.q_proj.weight": (32, 32), f"net.blocks.{i}.attn.out_proj.weight": (32, 32),
            f"net.blocks.{i}.mlp.up.weight": (96, 32), f"net.blocks.{i}.mlp.down.weight": (32, 96), f"net.blocks.{i}.norm.weight": (32,),
        }  # fmt: skip

    found = residual_writers({"net.embed.weight": (500, 32), **block(0), **block(1)}, {"model_type": "new", "hidden_size": 32})
    assert found.detected
    assert [one.name for one in found.writers] == [
        f"net.blocks.{i}.{name}.weight" for i in range(2) for name in ("mlp.down", "attn.out_proj")
    ]
    assert residual_writers({"net.embed.weight": (500, 32), **block(0)}).hidden_size == 32  # from the embedding


def test_a_bias_tells_the_output_side_of_an_unknown_transposed_layout():
    shapes = {"h.0.mlp.a.weight": (32, 128), "h.0.mlp.a.bias": (128,), "h.0.mlp.b.weight": (128, 32), "h.0.mlp.b.bias": (32,)}
    (writer,) = residual_writers(shapes, {"hidden_size": 32}).writers
    assert (writer.name, writer.parts[0].transposed, writer.shape) == ("h.0.mlp.b.weight", True, (32, 128))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "mixtral", "falcon", "starcoder2"])
def test_detection_finds_what_the_table_names(model_type):
    model = tiny(model_type)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    known, detected = (residual_writers(shapes, {"model_type": kind, "hidden_size": 32}) for kind in (model_type, "new"))
    dense = [one for one in known.writers if not one.parts[0].fused]  # three axes are not guessed at
    assert [one.parts for one in detected.writers] == [one.parts for one in dense]
    assert detected.blocks == known.blocks


def test_the_blocks_of_a_vision_tower_are_left_out():
    def tower(prefix, size):
        return {
            f"{prefix}.layers.0.self_attn.o_proj.weight": (size, size),
            f"{prefix}.layers.0.mlp.down_proj.weight": (size, 4 * size),
        }

    config = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 32}}
    found = residual_writers({**tower("vision_tower", 48), **tower("language_model.model", 32)}, config)
    assert found.blocks == {0: "language_model.model.layers.0"}


def test_no_writer_and_unequal_hidden_sizes_are_errors():
    with pytest.raises(UserError, match="no matrix that writes to the residual stream among 1 tensors"):
        residual_writers({"lm_head.weight": (100, 32)}, {"model_type": "llama"})
    shapes = {f"a.layers.{i}.self_attn.o_proj.weight": (size, size) for i, size in enumerate((32, 48))}
    with pytest.raises(UserError, match=r"have \[32, 48\] rows"):
        residual_writers(shapes, {"model_type": "llama"})
