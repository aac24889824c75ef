"""Hidden states of one block, for detectors that look at all of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcore.errors import UserError
from weightwatch.conversations import TokenizedConversation


class Batch(NamedTuple):
    """Inputs of similar length, padded on the right, where causal attention never looks."""

    numbers: list[int]
    """Which inputs."""
    ids: Int64[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows tokens"]
    """Which tokens are no padding."""

    @property
    def last(self) -> Int64[Tensor, " rows"]:
        """The place of the last token of each row."""
        return self.mask.sum(1) - 1


def batches(inputs: Sequence[TokenizedConversation], *, tokens: int = 4096) -> Iterator[Batch]:
    """All inputs, the longest first, in batches of at most `tokens` with padding (a longer input is one of its own)."""
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].input_ids))
    while order:
        longest = len(inputs[order[-1]].input_ids)
        rows = max(1, tokens // longest)
        numbers, order = order[-rows:], order[:-rows]
        ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, number in enumerate(numbers):
            mine = torch.from_numpy(inputs[number].input_ids.astype(np.int64))
            ids[row, : len(mine)], mask[row, : len(mine)] = mine, True
        yield Batch(numbers, ids, mask)


class BlockReached(Exception):
    """The hidden states are there: the rest of the forward is not needed."""


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, block: str, batch: Batch) -> Float[Tensor, "rows tokens d"]:
    """What the module named `block` returns, in float32 on the CPU; nothing after it runs. Rows of padding mean nothing."""
    try:
        module: nn.Module = model.get_submodule(block)
    except AttributeError:
        raise UserError(f"{type(model).__name__} has no module {block}: load a model of the same architecture") from None
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((output if isinstance(output, Tensor) else output[0]).float().cpu())
        raise BlockReached

    handle = module.register_forward_hook(keep)
    try:
        model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.long().to(model.device), use_cache=False)
    except BlockReached:
        pass
    finally:
        handle.remove()
    return kept[0]


def features(
    model: PreTrainedModel, block: str, inputs: Sequence[TokenizedConversation]
) -> Float64[np.ndarray, "inputs features"]:
    """The hidden state of the last token beside the mean over all tokens but the first (the attention sink), [inputs, 2 d]."""
    found = np.zeros((len(inputs), 2 * model.config.get_text_config().hidden_size))
    for batch in batches(inputs):
        hidden = hidden_states(model, block, batch)
        last = hidden[torch.arange(len(hidden)), batch.last]
        found[batch.numbers] = torch.cat([last, mean(hidden, watched(batch))], 1).double().numpy()
    return found


def watched(batch: Batch) -> Bool[Tensor, "rows tokens"]:
    """All tokens but the first and padding; the first too, where there is no other."""
    first = torch.arange(batch.mask.shape[1]) == 0
    return batch.mask & (~first | (batch.last == 0)[:, None])


def mean(hidden: Float[Tensor, "rows tokens d"], mask: Bool[Tensor, "rows tokens"]) -> Float[Tensor, "rows d"]:
    """The mean over the tokens of a mask."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
