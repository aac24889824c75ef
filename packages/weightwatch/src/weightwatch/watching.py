"""The live monitor: the cosines of a model's residual stream, taken while it reads and writes, at next to no cost."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcore.errors import UserError
from weightwatch.bounds import Bounds, Extremes
from weightwatch.conversations import ROLES
from weightwatch.directions import Bank
from weightwatch.events import Event, events_of
from weightwatch.reading import Reader
from weightwatch.recording import Peaks, Recorder, start_numba
from weightwatch.steering import Steerer, Steering


@contextmanager
def watch(
    model: PreTrainedModel, bank: Bank, bounds: Bounds | None = None, *, steer: Steering | Literal["remove", "clamp"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, skip_first: int = 1,
) -> Iterator["Watch"]:  # fmt: skip
    """Monitor every input that `model` reads in the block, in `generate` and in calls of the model alike, and steer it if asked to.

    A direction's cosine is `u·h / |h|` with h what its block returns. Tokens that were given have role 0, those that the model writes
    role 1 (`Reader` says which is which); the first `skip_first` tokens of an input, the attention sink, are left out, and so is
    padding. The last token of `generate` is never read, so it has no cosine.

    With `steer`, a direction that leaves its range is steered from that token on, in its own row of the batch; all other rows compute what
    they do without. Cosines are then those before the block's own steering and after that of the blocks before.

    Hooks keep references and measure later (`Recorder`), so cosines cost next to nothing; steering has to act at once and costs a kernel
    per block and forward. A model that was compiled as a whole and called before the block was entered does not look for new hooks: call
    `torch.compiler.reset()` there. Compiled graphs break at each watched block.

    >>> from lmcore.models import tiny_llama
    >>> model = tiny_llama(vocab_size=50, hidden_size=8, heads=2)
    >>> bank = Bank((0,), ("model.layers.0",), torch.eye(8)[None, :2], (("D0_u0", "D0_u1"),), ((1.0, 1.0),), "digest")
    >>> bounds = Bounds(np.full((2, 2), -0.6, np.float32), np.full((2, 2), 0.6, np.float32), "digest")
    >>> with watch(model, bank, bounds) as watching:
    ...     _ = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, pad_token_id=0)
    >>> low, high = watching.extremes()
    >>> low.shape, watching.flags()
    ((1, 2, 2), array([ True]))

    Source: Zhong and Raghunathan 2025 (arXiv 2508.00161), sections 3 and 4.
    Raises: `UserError` for a model that lacks the blocks of the bank, bounds of other directions, steering without bounds; later for what
    `Reader` refuses.
    """
    watching = Watch(model, bank, bounds, Steering(steer) if isinstance(steer, str) else steer, tokenizer, skip_first)
    with watching._attached(model):
        yield watching


class Watch:
    """What `watch` gives for the block; it answers within the block and after it."""

    def __init__(
        self, model: PreTrainedModel, bank: Bank, bounds: Bounds | None, steering: Steering | None,
        tokenizer: PreTrainedTokenizerBase | None, skip_first: int,
    ):  # fmt: skip
        if bounds is not None and (bounds.directions, bounds.low.shape) != (bank.directions, (len(ROLES), sum(bank.counts))):
            of = [f"{bounds.low.shape[1]} of {bounds.directions[:12]}", f"{sum(bank.counts)} of {bank.directions[:12]}"]
            raise UserError(
                f"the bounds are of other directions ({of[0]}) than the bank ({of[1]}): they do not belong together"
            )
        width = getattr(model.config.get_text_config(), "hidden_size", bank.vectors.shape[-1])
        if width != bank.vectors.shape[-1]:
            raise UserError(
                f"{type(model).__name__} has hidden size {width}, the directions {bank.vectors.shape[-1]}: "
                "load the model that the directions were made from"
            )
        self.labels = [label for labels in bank.labels for label in labels]
        """The directions, in the order of every array."""
        self._bounds, self._tokenizer = bounds, tokenizer
        self._blocks = [_block(model, name) for name in bank.blocks]
        self._reader = Reader(model, bank.blocks[0], skip_first=skip_first)
        self._recorder = Recorder(bank)
        self._steerer = Steerer(steering, bank, self._known_bounds()) if steering is not None else None

    @property
    def inputs(self) -> int:
        """How many inputs were read, or are being read."""
        return self._reader.inputs

    @property
    def roles(self) -> Integer[Tensor, "rows columns"] | None:
        """The role of each token that the model reads next, to be set: 0 given, 1 written by the model, -1 not to be watched.

        They hold for the columns of the next forward and, if they are more, of those after it; then they are None again. Without them the
        prompt of `generate` has role 0 and what it writes role 1; see `Reader` for other calls.
        """
        return self._reader.roles

    @roles.setter
    def roles(self, roles: Integer[Tensor, "rows columns"] | None) -> None:
        self._reader.roles = roles

    def extremes(self) -> tuple[Extremes, Extremes]:
        """The least and greatest cosine of each input, role and direction so far: what `Calibration.add` takes."""
        peaks = self.peaks()
        return peaks.low, peaks.high

    def peaks(self) -> Peaks:
        """The extremes and the positions of their tokens."""
        self._recorder.measure()
        found = [self._recorder.peaks(batch) for batch in self._reader.batches]
        empty = Peaks(
            *(np.zeros((0, len(ROLES), len(self.labels)), kind) for kind in (np.float32, np.float32, np.int64, np.int64))
        )
        return Peaks(*(np.concatenate(parts) for parts in zip(empty, *found, strict=True)))

    def flags(self) -> Bool[np.ndarray, " inputs"]:
        """Which inputs have left the bounds so far. Raises: `UserError` for cosines that are NaN."""
        return self._known_bounds().flags(*self.extremes())

    def events(self) -> list[Event]:
        """Every range that an input has left so far; the tokens' texts need the `tokenizer`."""
        return events_of(self._known_bounds(), self.peaks(), self.labels, self.token_ids, self._tokenizer)

    def steered(self) -> Bool[np.ndarray, "inputs directions"]:
        """Which directions are being steered in each input."""
        steerer = self._steerer
        found = [] if steerer is None else [steerer.fired(batch) for batch in self._reader.batches]
        return np.concatenate(found) if found else np.zeros((self.inputs, len(self.labels)), bool)

    def token_ids(self, number: int) -> Mapping[int, int]:
        """The token id at each position of an input, where the model was given ids."""
        batch = next(batch for batch in self._reader.batches if batch.first <= number < batch.first + batch.rows)
        return batch.token_ids(number - batch.first)

    def clear(self) -> None:
        """Forget the inputs so far and number the next from 0: a monitor that runs for long would keep all of them."""
        self._reader.forget()
        self._recorder.forget()
        if self._steerer is not None:
            self._steerer.forget()

    def _known_bounds(self) -> Bounds:
        if self._bounds is None:
            raise UserError("nothing was given that inputs could leave: watch with bounds")
        return self._bounds

    @contextmanager
    def _attached(self, model: PreTrainedModel) -> Iterator[None]:
        if model.device.type == "cpu":
            start_numba()
        handles = self._reader.attach()
        handles += self._steerer.attach(model) if self._steerer is not None else []
        handles += [block.register_forward_hook(self._hook(place)) for place, block in enumerate(self._blocks)]
        try:
            yield
            if not self._reader.seen:
                what = "if it was compiled before, call torch.compiler.reset() as the block begins"
                warnings.warn(f"{type(model).__name__} read nothing while it was watched: {what}", stacklevel=4)
        finally:
            self._reader.detach()
            for handle in handles:
                handle.remove()

    def _hook(self, place: int) -> Callable[[nn.Module, Any, Any], Any]:
        @torch.compiler.disable
        def after_block(module: nn.Module, args: Any, output: Any) -> Any:
            reading = self._reader.now
            if reading is None:  # the block was called by itself
                return None
            hidden = output if isinstance(output, Tensor) else output[0]
            self._recorder.add(place, hidden, reading)
            if self._steerer is None:
                return None
            steered = self._steerer.steer(place, hidden, reading)
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        return after_block


def _block(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no module {name}: load the model that the directions were made from"
        ) from None
