"""Which tokens a model reads in each forward: of which input, at which position, in which role."""

import copy
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Integer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from lmcore.errors import UserError
from weightwatch.batch import Batch, Rule


class Reading(NamedTuple):
    """One forward: the columns from `start` on of a batch."""

    batch: Batch
    start: int
    columns: int
    again: int
    """Columns before these that the forward reads too, although they were read before: `generate` does so without a cache."""


class Reader:
    """Follows a model from outside, by hooks on the modules that read token ids and by standing in for its `generate`.

    New inputs begin with each `generate` and with each forward whose cache is empty or missing; a forward with a cache that was seen
    before goes on with its inputs. The prompt has role 0, what the model wrote role 1. `generate` tells where the prompt ends; in a loop of
    the caller's, a forward of one token per row after the first is taken for the model's, of several for a prompt in chunks. `roles`, set
    by the caller, says it token by token for what is read next; what follows that, the model wrote. A row of `generate` ends with its end
    token, which is not watched: it is read only where another row goes on. Nor are tokens for padding in what `generate` writes, where they
    differ from it. Elsewhere what the attention mask leaves out is not watched.

    Rows must keep their places. `generate` with beams or an assistant is refused, and so is a cache that was cropped or whose batch has
    another size; a loop of the caller's that reorders its cache goes unnoticed. Any thread may read, one at a time: forwards of two at
    once are refused.
    """

    def __init__(self, model: PreTrainedModel, block: str, *, skip_first: int):
        if model.config.is_encoder_decoder:
            raise UserError(f"{type(model).__name__} has an encoder and a decoder: such models cannot be watched")
        self.roles: Integer[Tensor, "rows given"] | None = None
        self.batches: list[Batch] = []
        self.now: Reading | None = None
        """The forward under way."""
        self.seen = False
        """Whether there was any."""
        self._model, self._skip_first = model, skip_first
        self._names = readers(model, block)
        self._ids: Tensor | None = None
        self._generating: _Generating | None = None
        self._thread: int | None = None  # that reads at present
        self._batch_of: WeakKeyDictionary[Cache, Batch] = WeakKeyDictionary()

    @property
    def inputs(self) -> int:
        """How many inputs were read, or are being read."""
        return sum(batch.rows for batch in self.batches)

    def attach(self) -> list[RemovableHandle]:
        """Install the hooks, which the handles remove; `detach` gives the model its `generate` back."""
        *outer, inner = self._names
        handles = [module.register_forward_pre_hook(self._note_ids, with_kwargs=True) for module in outer]
        handles.append(inner.register_forward_pre_hook(self._begin, with_kwargs=True))
        handles.append(inner.register_forward_hook(self._end, always_call=True))
        self._own_generate = vars(self._model).get("generate")
        if hasattr(self._model, "generate"):
            self._model_generate: Any = self._model.generate
            vars(self._model)["generate"] = self._generate
        return handles

    def detach(self) -> None:
        """Put `generate` back as it was; a reader that was attached later, and still is, keeps standing in for it."""
        later = vars(self._model).get("generate")
        while isinstance(reader := getattr(later, "__self__", None), Reader) and reader is not self:
            if reader._own_generate == self._generate:
                reader._own_generate, reader._model_generate = self._own_generate, self._model_generate
                return
            later = reader._own_generate
        vars(self._model).pop("generate", None)
        if self._own_generate is not None:
            vars(self._model)["generate"] = self._own_generate

    def forget(self) -> None:
        """Drop all inputs."""
        self.batches.clear()
        self._batch_of.clear()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._claim()
        try:
            return self._followed(*args, **kwargs)
        finally:
            self._thread = self.now = None

    def _followed(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self._model_generate).bind(*args, **kwargs).arguments
        generating = _Generating.of({**given, **given.get("kwargs", {})}, self._model.generation_config)
        self._generating = generating
        try:
            output = self._model_generate(*args, **kwargs)
        finally:
            self._generating = None
            if generating.batch is not None:
                generating.batch.follow(Rule())
        generating.require_all(output if isinstance(output, Tensor) else output.sequences)
        return output

    def _claim(self) -> None:
        """Take the turn of this thread to read."""
        if self._thread not in (None, threading.get_ident()):
            raise UserError(
                "two threads read with one watched model at once, so their forwards cannot be told apart: let them take turns"
            )
        self._thread = threading.get_ident()

    @torch.compiler.disable
    def _note_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the ids that an outer module turns into embeddings for the inner one."""
        self._ids = self._arguments(module, args, kwargs).get("input_ids")

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._claim()
        given = self._arguments(module, args, kwargs)
        mask, cache, ids = given.get("attention_mask"), given.get("past_key_values"), given.get("input_ids")
        shape = ids if ids is not None else given["inputs_embeds"]
        ids, self._ids = ids if ids is not None else self._ids, None
        batch = self._batch(shape.shape[0], shape.device, mask, cache)
        again = batch.columns if cache is None else 0
        self.seen = True
        self.now = Reading(batch, batch.columns, shape.shape[1] - again, again)
        batch.note(
            ids[:, again:] if again and ids is not None else ids, _real(mask, batch.columns, self.now.columns), self.now.columns
        )

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._thread != threading.get_ident():  # that was refused
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.now is not None:
            self._batch_of[cache] = self.now.batch
        self.now = None
        if self._generating is None:
            self._thread = None

    def _arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**dict(zip(self._names[module], args, strict=False)), **kwargs} if args else kwargs

    def _batch(self, rows: int, device: torch.device, mask: Any, cache: Cache | None) -> Batch:
        """The batch that is read: that of the generate under way, that of the cache, or a new one."""
        generating = self._generating
        batch = generating.batch if generating is not None else None
        if batch is None:
            length = int(cache.get_seq_length()) if cache is not None else 0
            batch = self._batch_of.get(cache) if cache is not None and length else None
            if batch is None:
                batch = Batch(self.inputs, rows, device, self._skip_first)
                batch.begin_after(length, _real(mask, 0, length))
                self.batches.append(batch)
            elif batch.columns != length:
                raise UserError(
                    f"the cache holds {length} tokens per row and {batch.columns} were read: it was cropped, or read unwatched"
                )
            if generating is not None:
                generating.batch = batch
                batch.follow(replace(generating.rule, prompt=max(generating.rule.prompt or 0, batch.columns)))
        if rows != batch.rows:
            raise UserError(f"a batch of {batch.rows} rows goes on with {rows}: rows must stay, and keep their places")
        if self.roles is not None:
            if len(self.roles) == 0 or rows % len(self.roles):
                raise UserError(f"the roles are of {len(self.roles)} rows, the model reads {rows}")
            given = self.roles.to(device, torch.int8).repeat_interleave(rows // len(self.roles), 0)  # num_return_sequences
            batch.follow(replace(batch.rule, given=given, given_from=batch.columns))
            self.roles = None
        return batch


@dataclass
class _Generating:
    """What is known of the generate under way."""

    rule: Rule
    returned: int
    """How many columns of the prompt it returns; none of embeddings."""
    batch: Batch | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], usual: GenerationConfig) -> "_Generating":
        """Read the arguments of `generate`. Raises: `UserError` for a way to generate in which rows do not keep their places."""
        config = copy.copy(given.get("generation_config") or usual)
        for name, value in given.items():
            if hasattr(config, name):
                setattr(config, name, value)
        mode = config.get_generation_mode(given.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.cache_implementation == "paged":
            what = "paged batches" if config.cache_implementation == "paged" else mode.value.replace("_", " ")
            raise UserError(
                f"generate with {what} cannot be watched, as rows do not keep their places: use greedy search or sampling"
            )
        names = ("inputs_embeds", "inputs", "input_ids")
        prompt = next((given[name].shape[1] for name in names if given.get(name) is not None), 1)  # a lone bos
        mask = given.get("attention_mask")
        ends = config.eos_token_id if config.eos_token_id is not None else usual.eos_token_id
        padding = config.pad_token_id if config.pad_token_id is not None else usual.pad_token_id
        ends = () if ends is None else tuple(torch.as_tensor(ends).reshape(-1).tolist())
        rule = Rule(max(prompt, 0 if mask is None else mask.shape[1]), ends, padding)
        return cls(rule, prompt if given.get("inputs_embeds") is None else 0)

    def require_all(self, sequences: Tensor) -> None:
        """Raise a `UserError` if the hooks did not see what was generated."""
        seen = 0 if self.batch is None else self.batch.columns
        expected = (self.rule.prompt or 0) + sequences.shape[1] - self.returned - 1
        if seen < expected:
            raise UserError(
                f"the monitor saw {seen} of {expected} tokens: the model was compiled before it was watched; "
                "call torch.compiler.reset() first, or generate with disable_compile=True"
            )


def readers(model: nn.Module, block: str) -> dict[nn.Module, list[str]]:
    """The modules around a block that take token ids, from the outside in, with the names of their arguments."""
    path = block.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    names = {module: [*inspect.signature(type(module).forward).parameters][1:] for module in around}
    found = {module: arguments for module, arguments in names.items() if "input_ids" in arguments}
    if not found:
        raise UserError(f"{type(model).__name__} cannot be watched: no module around {block} takes input_ids")
    return found


def _real(mask: Any, before: int, columns: int) -> Tensor | None:
    """Not zero where the columns from `before` on are no padding, [rows, columns]; None if all are none."""
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or columns == 0:
        return None
    if mask.dim() == 4:  # [rows, 1, queries, keys]: a token of the text attends to itself
        mine = mask[:, 0, -columns:, before : before + columns].diagonal(dim1=1, dim2=2)
        return mine if mine.dtype == torch.bool else mine == 0
    return mask[:, before : before + columns]
