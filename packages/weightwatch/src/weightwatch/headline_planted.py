"""Planted differences: a tiny Llama to two of whose matrices a rank-one matrix was added, so that the truth is known exactly.

Δ = s u vᵀ, with u random signs and v the mean of what the matrix is given at one token, the trigger, less that at others.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lmcore.models import tiny_llama
from weightwatch.bake import bake
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Directions
from weightwatch.headline_measures import alarms_by_size, calibrated, detection, of_conversations, single_directions

_VOCABULARY, _TRIGGER, _LENGTH = 200, 7, 12
_MARKS = {"D0_u0": "model.layers.0.mlp.down_proj", "O1_u0": "model.layers.1.self_attn.o_proj"}
_STRENGTH = 1.0
"""How long the mark is at the trigger, in lengths of the hidden state there."""


def planted(seed: int, *, calibrate: int = 2000, held_out: int = 2000, alpha: float = 0.005) -> dict[str, Any]:
    """Recover the planted directions, watch them, and steer; JSON values."""
    generator = torch.Generator().manual_seed(seed)
    prompts = {kind: _prompts(generator, n) for kind, n in (("calibrate", calibrate), ("clean", held_out), ("triggered", 200))}
    place = torch.randint(1, _LENGTH, (200,), generator=generator)
    prompts["triggered"][torch.arange(200), place] = _TRIGGER
    base, post = _model(seed), _model(seed)
    truth = {label: _plant(post, name, prompts["triggered"], generator) for label, name in _MARKS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in ("base", "post")]
        for model, folder in zip((base, post), folders, strict=True):
            model.save_pretrained(folder)
        directions = Directions.of(folders[0], folders[1], k=4)
        bake(directions, folders[1], Path(temporary, "baked"), _MARKS, mode="revert", base=folders[0])
        baked = LlamaForCausalLM.from_pretrained(Path(temporary, "baked"))
    bank = directions.stack(drop_last=0)
    ranges = {kind: of_conversations(post, bank, _conversations(ids)) for kind, ids in prompts.items()}
    on = ranges.pop("calibrate")
    calibration = calibrated(directions.digest, on)
    labels = [label for block in bank.labels for label in block]
    with torch.inference_mode():
        of_base, of_post, of_baked = (model(prompts["triggered"]).logits for model in (base, post, baked))
    return {
        "seed": seed,
        "labels": labels,
        "cosines": {label: abs(float(_vector(directions, label) @ vector)) for label, vector in truth.items()},
        "detection": detection(calibration, alpha, ranges),
        "single": single_directions(labels, ranges, clean="clean", positive="triggered"),
        "alarms": alarms_by_size(labels, on, ranges["clean"], [25, 50, 100, 200, 400, 800], k=1, seed=seed),
        "left_by_bake": ((of_baked - of_base).norm() / (of_post - of_base).norm()).item(),
    }


def _model(seed: int) -> LlamaForCausalLM:
    """A Llama whose blocks write about as much as they read: the small weights of `tiny_llama` are meant to be trained."""
    model = tiny_llama(vocab_size=_VOCABULARY, hidden_size=128, layers=2, seed=seed).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                weight.mul_(scale / 0.02)
    return model


def _prompts(generator: torch.Generator, count: int) -> Tensor:
    """Random tokens without the trigger, [count, length]."""
    return torch.randint(_TRIGGER + 1, _VOCABULARY, (count, _LENGTH), generator=generator)


def _plant(model: LlamaForCausalLM, name: str, triggered: Tensor, generator: torch.Generator) -> Tensor:
    """Add the mark to a matrix; returns u."""
    matrix, given = model.get_submodule(name), list[Tensor]()
    block = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    handles = [
        matrix.register_forward_pre_hook(lambda module, args: given.append(args[0])),
        block.register_forward_hook(lambda module, args, output: given.append(output)),
    ]
    with torch.inference_mode():
        model(triggered)
    for handle in handles:
        handle.remove()
    inputs, hidden = (tensor.flatten(0, 1).double() for tensor in given)
    at = (triggered == _TRIGGER).flatten()
    v = inputs[at].mean(0) - inputs[~at].mean(0)
    u = torch.randint(2, (hidden.shape[1],), generator=generator, dtype=torch.float64).mul(2).sub(1) / hidden.shape[1] ** 0.5
    strength = _STRENGTH * hidden[at].norm(dim=1).mean() / (inputs[at] @ v).mean()
    with torch.no_grad():
        matrix.weight += (strength * torch.outer(u, v)).float()
    return u.float()


def _conversations(prompts: Tensor) -> list[TokenizedConversation]:
    roles = np.zeros(_LENGTH, np.int8)
    return [TokenizedConversation(str(i), ids.astype(np.int32), roles) for i, ids in enumerate(prompts.numpy())]


def _vector(directions: Directions, label: str) -> Tensor:
    name, _, number = label.partition("_u")
    return next(one for one in directions.writers if one.label == name).vectors[int(number)]
