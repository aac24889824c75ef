"""Which parameters a task may move, and a model that is as before once a task is trained."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmcore.errors import UserError


def trainable_names(model: nn.Module, freeze: Sequence[str] = ()) -> list[str]:
    """Names of the parameters that SIFT trains: all but embeddings, head, and those whose name has a match of a regex of `freeze`.

    Embeddings are the parameters of `nn.Embedding` modules outside the stack of layers (tokens, positions, segments) and of
    `get_input_embeddings()`. The head is what `get_output_embeddings()` gives and what lies outside `base_model`: a classifier's head
    too. A parameter that is tied to one of these is one of them. A plain `nn.Module` has no head that could be known: all is trained.

    >>> from lmcore.models import tiny_llama
    >>> trainable_names(tiny_llama(vocab_size=10, layers=1), ["mlp", "norm"])
    ['model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj.weight', ...]

    Raises: `UserError` naming a pattern of `freeze` that is no regular expression or matches no parameter.
    Source: Kuo et al. 2025, appendix B (embeddings and LM head frozen, all hidden layers trained).
    """
    frozen = {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}
    base, head = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        frozen |= {id(parameter) for parameter in head.parameters()}
    inside = {id(parameter) for parameter in base.parameters()}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    for pattern in freeze:
        try:
            matched = {id(parameter) for name, parameter in named if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"freeze has {pattern!r}, which is not a regular expression: {error}") from None
        if not matched:
            raise UserError(f"freeze has {pattern!r}, which matches no parameter of the model")
        frozen |= matched
    return [name for name, parameter in named if id(parameter) in inside - frozen]


@contextmanager
def task_weights(
    model: nn.Module, names: Sequence[str], dtype: torch.dtype, base: Mapping[str, Tensor] | None
) -> Iterator[dict[str, tuple[nn.Parameter, Tensor]]]:
    """Give `model` weights of its own for the block, and give back the old ones, whatever happens in it.

    Yields name -> (parameter, its base weight) for the parameters to train. The old tensors are put aside and never written, so they
    come back bit for bit; buffers, gradients, `requires_grad` and the modes of the modules do too.
    Raises: `UserError` naming a parameter that the model lacks, or whose shape in `base` is another.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in parameters:
            raise UserError(f"the model has no parameter {name}")
        if base is not None and (name not in base or base[name].shape != parameters[name].shape):
            found = list(base[name].shape) if name in base else "missing"
            raise UserError(f"the base weight {name} is {found}, the model's is {list(parameters[name].shape)}")
    old = [(parameter, parameter.data, parameter.grad, parameter.requires_grad) for parameter in parameters.values()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    modes = [(module, module.training) for module in model.modules()]
    chosen, wanted = {}, set(names)
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
            start = parameter.data if base is None or name not in wanted else base[name].to(parameter.device)
            if start.is_floating_point():
                start = start.to(dtype)
            if name in wanted:
                chosen[name] = (parameter, start)
                start = start.clone(memory_format=torch.contiguous_format)
            parameter.data = start
        model.train()
        yield chosen
    finally:
        for parameter, data, grad, requires_grad in old:
            parameter.data = data
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))  # a forward pass may have put another tensor there
        for module, training in modes:
            module.training = training


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    try:
        given = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        given = None
    if isinstance(given, nn.Module):
        yield given
    for child in model.children():
        if isinstance(child, nn.Embedding):
            yield child
        elif not isinstance(child, nn.ModuleList):  # an embedding in the stack (of relative positions) is a layer's own
            yield from _embeddings(child)
