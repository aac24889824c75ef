"""LoRA adapters: the weight difference s B A is known by its factors, so its singular vectors are exact and cost next to nothing."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from weightwatch.pair import FLOATS, read_config
from weightwatch.residual_writers import ResidualWriters, Writer, residual_writers
from weightwatch.singular import SingularVectors, oriented

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_A(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder of peft, open: what it adds to the residual writers."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    writers: ResidualWriters
    factors: dict[str, tuple[str, str]]
    """Names of the factors (A, B) by the name of the weight that they change."""
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, base_config: Mapping[str, Any] | None) -> "Adapter":
        """Read names, shapes and adapter_config.json; `base_config` is the config.json of the base model, if it is at hand.

        Raises: `UserError` for adapters other than LoRA and rsLoRA, and for one that changes no residual writer.
        """
        config = read_config(checkpoint, "adapter_config.json")
        _check(checkpoint, config)
        factors, shapes = {}, {}
        for a in checkpoint.tensors:
            match = _FACTOR.fullmatch(a)
            if match is None:
                continue
            b, weight = a.replace(".lora_A", ".lora_B"), f"{match['module']}.weight"
            if b not in checkpoint.tensors:
                raise UserError(f"{checkpoint.path} has tensor {a} but no {b}")
            for name in (a, b):
                if len(checkpoint.tensors[name].shape) != 2:
                    raise UserError(f"{checkpoint.path}: tensor {name} is {[*checkpoint.tensors[name].shape]}, not a matrix")
            (rank, inputs), (outputs, other) = checkpoint.tensors[a].shape, checkpoint.tensors[b].shape
            if rank != other:
                raise UserError(f"{checkpoint.path}: tensor {a} has rank {rank}, {b} has rank {other}")
            factors[weight], shapes[weight] = (a, b), (outputs, inputs)
        if base_config and config.get("fan_in_fan_out"):  # the layout of GPT-2 expects shapes as its weights are stored
            stored = {weight: (inputs, outputs) for weight, (outputs, inputs) in shapes.items()}
        else:
            stored = shapes
        try:
            writers = residual_writers(stored, base_config or {})
        except UserError as error:
            raise UserError(f"{checkpoint.path} ({len(factors)} LoRA modules): {error}") from None
        return cls(checkpoint, config, writers, factors, tuple(_left_out(checkpoint, writers, base_config)))

    def singular_vectors(self, writer: Writer, scale: Tensor | None = None) -> SingularVectors:
        """All singular vectors of diag(scale) [s_1 B_1 A_1 ... s_E B_E A_E], exact to float64.

        With B = Q_B R_B and A_eᵀ = Q_e R_e, they are those of the small matrix R_B diag(R_1ᵀ, ..., R_Eᵀ), turned by Q_B and the Q_e.
        """
        pairs = [self._factors_of(part.tensor) for part in writer.parts]
        tall = torch.cat([b for _, b in pairs], dim=1)
        left, left_core = torch.linalg.qr(tall if scale is None else tall * scale.double()[:, None])
        rights = [torch.linalg.qr(a.mT) for a, _ in pairs]
        core = left_core @ torch.block_diag(*(r for _, r in rights)).mT
        u, values, vt = torch.linalg.svd(core, full_matrices=False)
        right = vt @ torch.block_diag(*(q for q, _ in rights)).mT
        return oriented((left @ u).mT, right, values, torch.zeros_like(values), "exact")

    def _factors_of(self, weight: str) -> tuple[Tensor, Tensor]:
        """A [r, inputs] and s B [hidden size, r], float64."""
        a_name, b_name = self.factors[weight]
        a, b = (self.checkpoint.tensor(name).double() for name in (a_name, b_name))
        for name, factor in ((a_name, a), (b_name, b)):
            if not bool(torch.isfinite(factor).all()):
                raise UserError(f"{self.checkpoint.tensors[name].file}: tensor {name} holds NaN or infinity")
        alphas, module = self.config.get("alpha_pattern") or {}, weight.removesuffix(".weight")
        named = [value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)]  # as peft looks it up
        alpha = [*named, self.config["lora_alpha"]][0]
        return a, b * (alpha / (math.sqrt(len(a)) if self.config.get("use_rslora") else len(a)))


def _check(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if "peft_type" not in config:
        raise UserError(f"{checkpoint.path} is no adapter of peft: it has no adapter_config.json that names a peft_type")
    kind = "DoRA" if config.get("use_dora") else config["peft_type"]
    if kind != "LORA":
        raise UserError(f"{checkpoint.path} is {kind}: only plain LoRA can be read: merge it, compare the models")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise UserError(f"{checkpoint.path} was started by {start}, which changes the base too: convert it to plain LoRA")
    if config.get("target_parameters"):
        raise UserError(f"{checkpoint.path} has target_parameters: merge it, compare the models")
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}.items():
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{checkpoint.path}: adapter_config.json has {name} {alpha!r}, not a finite number")
    for name, info in checkpoint.tensors.items():
        if "lora_" in name and info.dtype not in FLOATS:
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}: save the adapter in a floating-point dtype")


def _left_out(checkpoint: Checkpoint, writers: ResidualWriters, base_config: Mapping[str, Any] | None) -> list[str]:
    """What of the adapter does not show in its directions."""
    warnings = []
    whole = [name for name in checkpoint.tensors if "lora_" not in name]
    if whole:
        warnings.append(f"{checkpoint.path} replaces whole tensors, such as {min(whole)}: they are not read")
    odd = [name for name in checkpoint.tensors if "lora_" in name and not re.search(r"lora_(A|B|embedding_[AB])(\.|$)", name)]
    if odd:
        warnings.append(f"{checkpoint.path}: {min(odd)} and {len(odd) - 1} other tensors are not read")
    if not base_config:
        warnings.append(f"{checkpoint.path}: without the base model, its residual writers were told by their names")
    return warnings
