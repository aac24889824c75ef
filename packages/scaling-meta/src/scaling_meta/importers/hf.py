"""A model folder of Hugging Face: the design from config.json, exact sizes from the headers of the weights."""

import math
from collections.abc import Iterable
from pathlib import Path

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.importers import Imported, Options, json_object
from scaling_meta.importers.architectures import ARCHITECTURES, Config, NotSaid, design
from scaling_meta.records import Fact, Model, Status
from scaling_meta.schema import ARCHITECTURE

_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight", "word_embeddings.weight", "embed_positions.weight",
)  # fmt: skip
_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


def read(folder: Path, options: Options) -> Imported:
    """One model, named as `options.name` or else as the folder. Tokens and shares of the data are in no config: `options.given` adds them.

    Weights are counted from the headers of the safetensors files, without reading them; without weights, by building the model from its
    config without memory, which transformers must know. Raises: `UserError` for an architecture that is not in `ARCHITECTURES`, naming
    the fields to give, for packed weights, and for an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter: import the model it was made for")
    path, name = folder / "config.json", options.name or folder.resolve().name
    config = json_object(path)
    kind, given = config.get("model_type"), options.given
    facts: list[Fact] = []

    def add(field: str, value: float | str, source: str, status: Status) -> None:
        facts.append(Fact(model=name, field=field, value=value, source=f"{source} of {name}", status=status))

    if kind in ARCHITECTURES:
        try:
            for field, value in design(ARCHITECTURES[str(kind)], config, leave=given).items():
                add(field, value, "config.json", "derived" if field == "mlp_ratio" else "reported")
        except NotSaid as error:
            raise UserError(f"{path}: {error}") from None
    else:
        wanted = [field for field in ARCHITECTURE if field not in given]
        if wanted:
            advice = " ".join(f"--set {field}=..." for field in wanted)
            raise UserError(f"{path}: unknown architecture {kind!r}: give {advice} (unknown where it is not known)")
    if "params" not in given:
        tied = bool(config.get("tie_word_embeddings", ARCHITECTURES[str(kind)].tied if kind in ARCHITECTURES else False))
        found = _in_weights(folder, config) if any(folder.glob("*.safetensors*")) else None
        total, embedding = _count(found or _in_model(folder), tied)
        source = "headers of the weights" if found else "model built from config.json"
        for field, count in (("params", total), ("embedding_params", embedding), ("non_embedding_params", total - embedding)):
            add(field, float(count), source, "derived")
    model = Model(model=name, source=f"config.json of {name}", status="reported")
    return Imported(Database.of([model], facts))


def _in_weights(folder: Path, config: Config) -> dict[str, int]:
    """Sizes of the weights in the files by name, without buffers (causal masks, rotary frequencies), which are not trained."""
    with Checkpoint.open(folder) as checkpoint:
        weights = {name: info for name, info in checkpoint.tensors.items() if not _is_buffer(name, info.shape, info.dtype)}
    packed = [name for name, info in weights.items() if info.dtype in _INTEGERS]
    if packed or config.get("quantization_config"):
        where = f"tensor {packed[0]} has whole numbers" if packed else "config.json has a quantization_config"
        raise UserError(f"{folder}: {where}: packed weights cannot be counted: give --set params=...")
    return {name: info.size for name, info in weights.items()}


def _in_model(folder: Path) -> dict[str, int]:
    """Sizes of the weights of the model that the config describes."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # whatever transformers meets in a config
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} has no weights, and no model can be built from its config.json to count them ({why}): give --set params=..."
        ) from None
    return {name: weight.numel() for name, weight in model.named_parameters()}


def _count(sizes: dict[str, int], tied: bool) -> tuple[int, int]:
    """All weights, and those in embeddings and an untied head; a tied head is the token embedding, however often it was saved."""
    heads = {name for name in sizes if name.endswith(_HEADS)}
    embeddings = {name for name in sizes if name.endswith(_EMBEDDINGS)}
    again = {name for name in heads if tied and name.endswith(".weight") and embeddings}
    return _sum(sizes, sizes.keys() - again), _sum(sizes, (heads | embeddings) - again)


def _sum(sizes: dict[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)


def _is_buffer(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Causal masks have four dimensions (as attn.bias in GPT-2 and GPT-NeoX), or are booleans; masked_bias is one number."""
    mask = len(shape) == 4 or dtype == "BOOL" or (name.endswith("masked_bias") and math.prod(shape) == 1)
    return mask or name.endswith(("rotary_emb.inv_freq", "position_ids", "attn.embed_positions", "attn.scale_attn"))
