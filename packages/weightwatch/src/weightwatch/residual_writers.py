"""Which tensors of a checkpoint write to the residual stream, known from names and shapes alone.

A block adds two things to the residual stream: what its attention (or another mixer of tokens) returns, `O x`, and what its MLP returns,
`D x`. The matrices `O` and `D`, [hidden size, inputs], are the residual writers. Where the outputs of several matrices are added up, of the
experts of a mixture or of self- and cross-attention, the writer is their concatenation along the inputs: W_1 x_1 + ... + W_E x_E = W x.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmcore.errors import UserError

Kind = Literal["mlp", "attention"]


@dataclass(frozen=True)
class Layout:
    """Names of an architecture, as they follow `blocks.<number>.`; `*` is the number of an expert.

    A name that ends in `.T` is stored [..., inputs, hidden size] (GPT-2's Conv1D, some fused experts), any other [..., hidden size,
    inputs]; three axes are the experts of a layer in one tensor. `*_norms` scale the rows on their way to the block's output, by
    `norm_offset + weight`: norms after the sublayer (Gemma 2, OLMo 2) or on the stream itself (BERT).
    """

    blocks: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    attention_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0


_O, _DOWN = "self_attn.o_proj.weight", "mlp.down_proj.weight"
_EXPERTS = ("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj")
_SANDWICH = ("post_attention_layernorm.weight",), ("post_feedforward_layernorm.weight",)
_LLAMA = Layout("layers", (_O,), (_DOWN,))
_MOE = Layout("layers", (_O,), (_DOWN, "mlp.shared_expert.down_proj.weight", "mlp.shared_experts.down_proj.weight", *_EXPERTS))
_GEMMA = Layout("layers", (_O,), (_DOWN,), *_SANDWICH, norm_offset=1.0)
_BLOOM = Layout("h", ("self_attention.dense.weight",), ("mlp.dense_4h_to_h.weight",))
_BERT = Layout(
    "layer", ("attention.output.dense.weight",), ("output.dense.weight",),
    ("attention.output.LayerNorm.weight", "output.LayerNorm.weight"), ("output.LayerNorm.weight",),
)  # fmt: skip
_T5 = Layout(
    "block", ("layer.0.SelfAttention.o.weight", "layer.1.EncDecAttention.o.weight"),
    ("layer.1.DenseReluDense.wo.weight", "layer.2.DenseReluDense.wo.weight"),
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "phi3", "smollm3", "stablelm", "granite", "cohere"), _LLAMA),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"), _MOE),
    "mixtral": Layout("layers", (_O,), ("block_sparse_moe.experts.*.w2.weight", "mlp.experts.down_proj")),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "olmo2": Layout("layers", (_O,), (_DOWN,), *_SANDWICH),
    "gpt_oss": Layout("layers", (_O,), ("mlp.experts.down_proj.T",)),
    "llama4_text": Layout(
        "layers", (_O,),
        ("feed_forward.down_proj.weight", "feed_forward.shared_expert.down_proj.weight", "feed_forward.experts.down_proj.T"),
    ),
    "granitemoe": Layout("layers", (_O,), ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj")),
    "phi": Layout("layers", ("self_attn.dense.weight",), ("mlp.fc2.weight",)),
    "starcoder2": Layout("layers", (_O,), ("mlp.c_proj.weight",)),
    "gpt2": Layout("h", ("attn.c_proj.weight.T",), ("mlp.c_proj.weight.T",)),
    "gpt_bigcode": Layout("h", ("attn.c_proj.weight",), ("mlp.c_proj.weight",)),
    "gpt_neo": Layout("h", ("attn.attention.out_proj.weight",), ("mlp.c_proj.weight",)),
    "gptj": Layout("h", ("attn.out_proj.weight",), ("mlp.fc_out.weight",)),
    "gpt_neox": Layout("layers", ("attention.dense.weight",), ("mlp.dense_4h_to_h.weight",)),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "mpt": Layout("blocks", ("attn.out_proj.weight",), ("ffn.down_proj.weight",)),
    "opt": Layout("layers", ("self_attn.out_proj.weight",), ("fc2.weight",)),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "t5": _T5,
}  # fmt: skip
"""Layouts by the `model_type` of config.json."""


@dataclass(frozen=True)
class Part:
    """One matrix of a writer: a tensor, or expert `expert` of a tensor with the experts of a layer (`fused`)."""

    tensor: str
    shape: tuple[int, int]
    """[hidden size, inputs], whichever way it is stored."""
    transposed: bool = False
    expert: int | None = None
    fused: bool = False


@dataclass(frozen=True)
class Writer:
    """What the MLP or the attention of one block writes with: the concatenation of `parts` along the inputs."""

    layer: int
    kind: Kind
    parts: tuple[Part, ...]
    norms: tuple[str, ...] = ()
    """Tensors whose product, of `norm_offset + weight` each, scales the rows before they reach the block's output (see `Layout`)."""
    norm_offset: float = 0.0

    @property
    def name(self) -> str:
        """Name of the tensor, with `*` where several make one writer."""
        first, last = self.parts[0].tensor, self.parts[-1].tensor
        if first == last:
            return first
        same = [one == other for one, other in zip(first, last, strict=False)]
        return first[: [*same, False].index(False)] + "*"

    @property
    def shape(self) -> tuple[int, int]:
        """[hidden size, inputs] of the concatenation."""
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)


@dataclass(frozen=True)
class ResidualWriters:
    """The writers of a checkpoint, block by block, in a block the MLP before the attention (the order of the paper's code).

    `blocks[layer]` is the name of the module whose output is the residual stream after that block; decoder blocks count on from the
    encoder's. `detected` says that the architecture is unknown and the writers were told by shapes and names (`residual_writers`).
    """

    model_type: str
    hidden_size: int
    blocks: dict[int, str]
    writers: tuple[Writer, ...]
    detected: bool = False


def residual_writers(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> ResidualWriters:
    """Find the residual writers among tensors, given by name and shape, of a model with this config.json.

    Where `LAYOUTS` lacks the model type they are detected: tensors of two axes inside numbered blocks whose output side has the hidden
    size. A bias tells which side that is; a square matrix counts where its name says output (`o_proj`, `out_proj`, `dense`, ...).

    >>> shapes = {f"model.layers.0.{name}.weight": (8, 8) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    >>> found = residual_writers(shapes, {"model_type": "llama"})
    >>> [(writer.kind, writer.name) for writer in found.writers], found.blocks
    ([('mlp', 'model.layers.0.mlp.down_proj.weight'), ('attention', 'model.layers.0.self_attn.o_proj.weight')], {0: 'model.layers.0'})

    Raises: `UserError` where no writer is found, or writers have different hidden sizes.
    """
    config = config or {}
    text = {**config, **(config.get("text_config") or {})}
    layout = LAYOUTS.get(text.get("model_type", "")) or LAYOUTS.get(config.get("model_type", ""))
    hidden_size = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if isinstance(text.get(key), int)), None)
    named = _by_layout(shapes, layout) if layout else _by_shape(shapes, hidden_size)
    if hidden_size:  # leaves out the blocks of a vision tower
        named = [found for found in named if found.part.shape[0] == hidden_size]
    model_type = text.get("model_type", "unknown")
    if not named:
        raise UserError(f"no matrix that writes to the residual stream among {len(shapes)} tensors (model type {model_type})")
    sizes = sorted({found.part.shape[0] for found in named})
    if len(sizes) > 1:
        raise UserError(
            f"matrices that write to the residual stream have {sizes} rows: is there a config.json with hidden_size?"
        )
    blocks = _number_blocks(found.block for found in named)
    layers = {block: layer for layer, block in blocks.items()}
    groups: dict[tuple[int, str], list[Part]] = {}
    for found in sorted(named, key=lambda found: -1 if found.part.expert is None else found.part.expert):
        groups.setdefault((layers[found.block], found.kind), []).append(found.part)
    writers = []
    for layer, block in blocks.items():
        for kind, norms in _KINDS.items():
            if (layer, kind) in groups:
                scaled_by = tuple(f"{block}.{name}" for name in getattr(layout, norms, ()))
                offset = layout.norm_offset if layout else 0.0
                writers.append(Writer(layer, kind, tuple(groups[layer, kind]), scaled_by, offset))
    return ResidualWriters(model_type, sizes[0], blocks, tuple(writers), detected=layout is None)


_KINDS: dict[Kind, str] = {"mlp": "mlp_norms", "attention": "attention_norms"}


@dataclass(frozen=True)
class _Found:
    block: str
    kind: Kind
    part: Part


def _by_layout(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> list[_Found]:
    found = []
    for kind, names in (("mlp", layout.mlp), ("attention", layout.attention)):
        for name in names:
            transposed, name = name.endswith(".T"), name.removesuffix(".T")
            inside = re.escape(name).replace(r"\*", r"(?P<expert>\d+)")
            pattern = re.compile(rf"(?P<block>(?:.*\.)?{layout.blocks}\.\d+)\.{inside}")
            for tensor, shape in shapes.items():
                match = pattern.fullmatch(tensor)
                if match and len(shape) in (2, 3):
                    expert = match.groupdict().get("expert")
                    found += _parts(match["block"], kind, tensor, shape, transposed, None if expert is None else int(expert))
    return found


_OUTPUT = re.compile(r"(o|out|output|wo|w2|proj|dense|fc2|dense_4h_to_h|(c|o|out|down|attn_out)_proj)(_linear)?")
_MIXER = re.compile(r"attn|attention|mixer|mamba|rnn|conv", re.IGNORECASE)


def _by_shape(shapes: Mapping[str, tuple[int, ...]], hidden_size: int | None) -> list[_Found]:
    inside = {name: match for name in shapes if (match := re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name))}
    if hidden_size is None:
        outside = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in inside]
        square = [shapes[name][0] for name in inside if len(shapes[name]) == 2 and _OUTPUT.fullmatch(_last(name))]
        hidden_size = min(max(outside)) if outside else max(square, key=square.count, default=None)
    biases = {name: shapes.get(name.removesuffix("weight") + "bias") for name in inside}
    transposed = any(bias and bias == shapes[name][1:] != shapes[name][:1] for name, bias in biases.items())
    found = []
    for name, match in sorted(inside.items()):  # by name, as the parts of two checkpoints must pair
        shape = shapes[name]
        if len(shape) != 2 or hidden_size not in shape:
            continue
        rows, inputs = shape[::-1] if transposed else shape
        named = _OUTPUT.fullmatch(_last(name)) is not None
        if rows == hidden_size and (named or (inputs != hidden_size and not re.search("embed|router|gate$", _last(name)))):
            expert = re.search(r"experts?\.(\d+)\.", match[2])
            kind: Kind = "attention" if _MIXER.search(match[2]) else "mlp"
            found += _parts(match[1], kind, name, shape, transposed, int(expert[1]) if expert else None)
    return found


def _parts(block: str, kind: Any, tensor: str, shape: tuple[int, ...], transposed: bool, expert: int | None) -> list[_Found]:
    rows, inputs = shape[-2:][::-1] if transposed else shape[-2:]
    if len(shape) == 2:
        return [_Found(block, kind, Part(tensor, (rows, inputs), transposed, expert))]
    return [_Found(block, kind, Part(tensor, (rows, inputs), transposed, number, fused=True)) for number in range(shape[0])]


def _number_blocks(names: Iterable[str]) -> dict[int, str]:
    """Number the blocks: by the number in their name; the blocks of a decoder count on from its encoder's."""
    stacks: dict[str, list[int]] = {}
    for block in dict.fromkeys(names):
        stack, _, number = block.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    blocks, first = {}, 0
    for stack in sorted(stacks, key=lambda stack: ("decoder" in stack, stack)):
        blocks.update({first + number: f"{stack}.{number}".lstrip(".") for number in sorted(stacks[stack])})
        first += max(stacks[stack]) + 1
    return blocks


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
