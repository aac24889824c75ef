"""How each architecture writes its design into config.json."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]
Said = str | Callable[[Config], str]
"""A category, or how to tell it from the config."""


class NotSaid(ValueError):
    """A config that does not say what is needed."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Keys of the numbers in config.json (the first that is there), and the categories. Defaults are those of Llama.

    `inner` is the width of the MLP, or where absent `ratio` (a number or the key of one) times `dimension`; `activation` is told from
    `nonlinearity` and `gated` unless it is fixed; `tied` is whether the head is the token embedding where the config does not say.
    """

    dimension: tuple[str, ...] = ("hidden_size",)
    heads: tuple[str, ...] = ("num_attention_heads",)
    inner: tuple[str, ...] = ("intermediate_size",)
    ratio: float | str | None = None
    positions: tuple[str, ...] = ("max_position_embeddings",)
    nonlinearity: tuple[str, ...] = ("hidden_act",)
    gated: bool = True
    activation: str | None = None
    attention: Said | None = None
    biases: Said = "none"
    block: Said = "sequential"
    norm: Said = "rmsnorm"
    embeddings: Said = "rope"
    tied: bool = False


def design(architecture: Architecture, config: Config, leave: Collection[str] = ()) -> dict[str, float | str]:
    """The fields of architecture that a config says, but those in `leave`. Raises: `NotSaid` for one that it does not say."""
    readers: dict[str, Callable[[], float | str | None]] = {
        "dimension": lambda: _number(config, architecture.dimension, "dimension"),
        "num_heads": lambda: _number(config, architecture.heads, "num_heads"),
        "mlp_ratio": lambda: _ratio(architecture, config),
        "sequence_length": lambda: _number(config, architecture.positions, "sequence_length"),
        "activation": lambda: _activation(architecture, config),
        "attention_variant": lambda: _said(architecture.attention or _by_heads(architecture), config),
        "biases": lambda: _said(architecture.biases, config),
        "block_type": lambda: _said(architecture.block, config),
        "layer_norm_type": lambda: _said(architecture.norm, config),
        "positional_embeddings": lambda: _said(architecture.embeddings, config),
    }
    found = {field: read() for field, read in readers.items() if field not in leave}
    return {field: value for field, value in found.items() if value is not None}


def _said(said: Said, config: Config) -> str:
    return said if isinstance(said, str) else said(config)


def _number(config: Config, keys: tuple[str, ...], field: str) -> float:
    for key in keys:
        if isinstance(config.get(key), int | float) and config[key] > 0:
            return float(config[key])
    raise NotSaid(f"it has no {keys[0]}: give --set {field}=... (unknown if it is not known)")


def _ratio(architecture: Architecture, config: Config) -> float:
    dimension = _number(config, architecture.dimension, "dimension")
    if architecture.ratio is not None and not any(config.get(key) for key in architecture.inner):
        ratio = architecture.ratio
        return ratio if isinstance(ratio, float) else _number(config, (ratio,), "mlp_ratio")
    return round(_number(config, architecture.inner, "mlp_ratio") / dimension, 9)


def _activation(architecture: Architecture, config: Config) -> str:
    if architecture.activation:
        return architecture.activation
    name = next((config[key] for key in architecture.nonlinearity if config.get(key)), None)
    plain = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}.get(str(name), str(name))
    if architecture.gated and plain in ("silu", "gelu", "gelu_new", "gelu_fast"):
        return "swiglu" if plain == "silu" else "geglu"
    if architecture.gated or plain not in ("silu", "gelu", "gelu_new", "gelu_fast", "relu"):
        raise NotSaid(f"{architecture.nonlinearity[0]} is {name!r}: give --set activation=...")
    return plain


def _by_heads(architecture: Architecture) -> Callable[[Config], str]:
    """Attention by the number of key and value heads, which is that of the query heads if not said."""

    def variant(config: Config) -> str:
        heads = _number(config, architecture.heads, "attention_variant")
        return _variant(config.get("num_key_value_heads") or heads, heads)

    return variant


def _variant(groups: float, heads: float) -> str:
    return "full" if groups == heads else "mqa" if groups == 1 else "gqa"


def _if(key: str, yes: str, no: str, *, default: bool = False) -> Callable[[Config], str]:
    """A category that a switch of the config chooses."""
    return lambda config: yes if config.get(key, default) else no


def _llama_biases(config: Config) -> str:
    return "some" if config.get("mlp_bias") else "attn_only" if config.get("attention_bias") else "none"


def _falcon_attention(config: Config) -> str:
    heads = _number(config, ("num_attention_heads", "n_head"), "attention_variant")
    if config.get("new_decoder_architecture"):
        return _variant(config.get("num_kv_heads") or heads, heads)
    return "mqa" if config.get("multi_query", True) else "full"


def _mpt(config: Config) -> Config:
    return config.get("attn_config") or {}


def _mpt_attention(config: Config) -> str:
    heads, kind = _number(config, ("n_heads",), "attention_variant"), _mpt(config).get("attn_type", "multihead_attention")
    groups = {"multihead_attention": heads, "multiquery_attention": 1}.get(kind, _mpt(config).get("kv_n_heads") or heads)
    return _variant(groups, heads)


def _gpt_neo_attention(config: Config) -> str:
    kinds = [name for names, _ in config.get("attention_types") or [[["global", "local"], 1]] for name in names]
    return "local,full" if "local" in config.get("attention_layers", kinds) else "full"


_GPT = Architecture(
    dimension=("n_embd", "hidden_size"), heads=("n_head", "num_attention_heads"), inner=("n_inner",), ratio=4.0,
    positions=("n_positions", "n_ctx", "max_position_embeddings"), nonlinearity=("activation_function",), gated=False,
    attention="full", biases="some", norm="parametric",
)  # fmt: skip
_GEMMA = Architecture(nonlinearity=("hidden_activation", "hidden_act"), biases=_llama_biases, tied=True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(biases=_llama_biases),
    "mistral": Architecture(),
    "qwen2": Architecture(biases="attn_only"),
    "qwen3": Architecture(biases=_llama_biases),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, attention="local,full"),
    "gemma3_text": replace(_GEMMA, attention="local,full"),
    "olmo": Architecture(biases=_llama_biases, norm="non-parametric"),
    "olmo2": Architecture(biases=_llama_biases),
    "phi": Architecture(gated=False, biases="some", block="parallel", norm="parametric"),
    "phi3": Architecture(),
    "stablelm": Architecture(
        biases=_if("use_qkv_bias", "attn_only", "ln_only"), norm="parametric",
        block=_if("use_parallel_residual", "parallel", "sequential"),
    ),
    "gpt2": replace(_GPT, embeddings="learned", tied=True),
    "gptj": replace(_GPT, block="parallel"),
    "codegen": replace(_GPT, block="parallel"),
    "gpt_neo": Architecture(
        heads=("num_heads",), ratio=4.0, nonlinearity=("activation_function",), gated=False, attention=_gpt_neo_attention,
        biases="some", norm="parametric", embeddings="learned", tied=True,
    ),
    "gpt_neox": Architecture(
        gated=False, biases="some", norm="parametric", block=_if("use_parallel_residual", "parallel", "sequential", default=True),
    ),
    "opt": Architecture(
        inner=("ffn_dim",), nonlinearity=("activation_function",), gated=False, biases=_if("enable_bias", "some", "ln_only", default=True),
        norm=_if("layer_norm_elementwise_affine", "parametric", "non-parametric", default=True), embeddings="learned", tied=True,
    ),
    "falcon": Architecture(
        heads=("num_attention_heads", "n_head"), inner=("ffn_hidden_size",), ratio=4.0, nonlinearity=("activation",), gated=False,
        attention=_falcon_attention, biases=_if("bias", "some", "ln_only"), norm="parametric",
        block=lambda config: "parallel" if config.get("parallel_attn", True) or config.get("new_decoder_architecture") else "sequential",
        embeddings=_if("alibi", "alibi", "rope"), tied=True,
    ),
    "bloom": Architecture(
        dimension=("hidden_size", "n_embed"), heads=("n_head", "num_attention_heads"), inner=("n_inner",), ratio=4.0,
        positions=("seq_length",), activation="gelu_new", attention="full", biases="some", norm="parametric", embeddings="alibi", tied=True,
    ),
    "mpt": Architecture(
        dimension=("d_model",), heads=("n_heads",), inner=(), ratio="expansion_ratio", positions=("max_seq_len",), activation="gelu",
        attention=_mpt_attention, biases=_if("no_bias", "none", "some", default=True), norm="parametric",
        embeddings=lambda config: "alibi" if _mpt(config).get("alibi", True) else "learned", tied=True,
    ),
}  # fmt: skip
"""By `model_type`."""
