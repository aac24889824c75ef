"""The words that a direction writes: the logit lens of a vector of the residual stream, without a forward pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from weightwatch.pair import read_config

Decode = Callable[[list[int]], str]
"""From token ids to text: `decode` of a tokenizer."""

_UNEMBEDDINGS = (
    "lm_head.weight", "embed_out.weight", "output.weight", "cls.predictions.decoder.weight", "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight", "word_embeddings.weight", "model.decoder.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight", "roberta.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight",
    "embed_tokens.weight",
)  # fmt: skip
"""Names of the matrix [vocabulary, d] that scores tokens; where it is tied, the embedding that is saved in its place."""
_FINAL_NORMS = (
    "model.norm", "model.language_model.norm", "model.final_layernorm", "transformer.ln_f", "ln_f", "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm", "norm",
)  # fmt: skip
_GAIN_LESS_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text", "paligemma")
"""Model types that multiply by one more than the weight of the norm."""
_ROWS = 8192  # of the unembedding at a time


@dataclass(frozen=True)
class Words:
    """Tokens at both ends of a direction, strongest first, each with its z-score among the logits of the whole vocabulary."""

    high: tuple[tuple[str, float], ...]
    low: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return " ".join(token for token, _ in self.high)


def words(vectors: Float[Tensor, "n d"], checkpoint: Checkpoint, decode: Decode | None = None, *, top: int = 10) -> list[Words]:
    """Give the `top` tokens that each direction raises most, and lowers most: logits W_U (g * u).

    W_U [vocabulary, d] is the unembedding (the saved embedding where they are tied) and g the gain of the final norm; where that is a
    LayerNorm (it has a bias), u is centred first, as the norm would. This is what the direction adds to the logits if nothing after it
    reacts, up to a factor that all tokens share. A z-score is (logit - mean) / standard deviation over the vocabulary.

    Reads the unembedding once, in pieces; FLOPs: 2 n d vocabulary. Without `decode`, tokens are shown as `#id`.

    Source: the logit lens of weight directions, nostalgebraist 2020, "interpreting GPT: the logit lens".
    Raises: `UserError` where the checkpoint has no unembedding of width d.
    """
    name = next((name for name in _UNEMBEDDINGS if name in checkpoint.tensors), None)
    if name is None or checkpoint.tensors[name].shape[1:] != vectors.shape[1:]:
        raise UserError(f"{checkpoint.path} has no unembedding of width {vectors.shape[1]}: there are no words to read from it")
    if len(vectors) == 0:
        return []
    through = _through_the_norm(vectors.float(), checkpoint)
    count, total, squares = checkpoint.tensors[name].shape[0], torch.zeros(len(through)), torch.zeros(len(through))
    ends: dict[bool, tuple[Tensor, Tensor]] = {}
    for start, rows in _pieces(checkpoint, name):
        logits = through @ rows.T
        total, squares = total + logits.sum(1), squares + logits.square().sum(1)
        for largest in (True, False):
            best, at = logits.topk(min(top, len(rows)), largest=largest)
            before, ids = ends.get(largest, (best[:, :0], at[:, :0]))
            best, ids = torch.cat([before, best], 1), torch.cat([ids, at + start], 1)
            kept, order = best.topk(min(top, best.shape[1]), largest=largest)
            ends[largest] = kept, ids.gather(1, order)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    shown = {
        largest: [
            tuple(zip(_shown(ids, decode), scores, strict=True))
            for ids, scores in zip(at.tolist(), _z(best, mean, deviation), strict=True)
        ]
        for largest, (best, at) in ends.items()
    }
    return [Words(high, low) for high, low in zip(shown[True], shown[False], strict=True)]


def _z(logits: Tensor, mean: Tensor, deviation: Tensor) -> list[list[float]]:
    """z-scores to three decimals; 0 for a direction that moves all logits alike."""
    z = (logits - mean[:, None]) / torch.where(deviation > 0, deviation, torch.inf)[:, None]
    return [[round(value, 3) for value in row] for row in z.tolist()]


def _through_the_norm(vectors: Tensor, checkpoint: Checkpoint) -> Tensor:
    norm = next((norm for norm in _FINAL_NORMS if f"{norm}.weight" in checkpoint.tensors), None)
    if norm is None:
        return vectors
    gain = checkpoint.tensor(f"{norm}.weight").float()
    if f"{norm}.bias" in checkpoint.tensors:
        vectors = vectors - vectors.mean(1, keepdim=True)
    if read_config(checkpoint).get("model_type") in _GAIN_LESS_ONE:
        gain = gain + 1
    return vectors * gain


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """Rows of the unembedding as float32, with the number of the first."""
    weight = checkpoint.tensor(name)
    for start in range(0, len(weight), _ROWS):
        yield start, weight[start : start + _ROWS].float()


def _shown(ids: Sequence[int], decode: Decode | None) -> list[str]:
    if decode is None:
        return [f"#{i}" for i in ids]
    return [decode([i]) for i in ids]
