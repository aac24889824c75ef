"""The distribution a token is drawn from (temperature, then top-k, top-p and min-p), and the draw."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lmcore.errors import UserError

NUMBERS_PER_TOKEN = 32
"""How many uniform numbers `draw` takes: enough for vocabularies of up to 2^32 tokens."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next-token distribution is shaped; None leaves a filter out. See `filtered_log_softmax` for the formulas.

    Raises: `UserError` naming the setting that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        self._require("temperature", 0 <= self.temperature < math.inf, "must be finite and at least 0 (0 is greedy)")
        self._require("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1")
        self._require("top_p", self.top_p is None or 0 < self.top_p <= 1, "must be in (0, 1]")
        self._require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "must be in [0, 1]")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}: it {rule}")


def filtered_log_softmax(
    logits: Float[Tensor, "*batch vocabulary"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Tensor, "*batch vocabulary"]:
    """Log-probabilities (nats) of the tempered and filtered distribution, -inf for the tokens that are filtered out.

    Applied in this order, which is that of `transformers`' generation; each step sees the renormalised result of the
    one before:

    1. temperature T: `p = softmax(logits / T)`; T = 0 puts mass 1 on the argmax (the first one, if several are equal);
    2. top-k: keeps the k most probable tokens, and any that equal the k-th;
    3. top-p: keeps a token if the tokens more probable than it sum to less than `top_p` (of equal tokens the lower id
       counts as more probable), so the kept mass is the smallest that reaches `top_p`;
    4. min-p: keeps the tokens with `p >= min_p * max(p)`.

    The most probable token always stays. Arithmetic and result are float32, or float64 for float64 logits;
    differentiable with respect to the logits of the tokens kept.

    >>> logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    >>> filtered_log_softmax(logits, top_p=0.6).exp()
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    >>> filtered_log_softmax(logits, top_k=3, min_p=0.5).exp()
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    >>> filtered_log_softmax(logits, temperature=0.0).exp()
    tensor([1., 0., 0., 0.])

    Raises: `UserError` for a setting out of range (see `Decoding`).
    Source: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024.
    """
    Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    # With the largest logit at 0 no temperature overflows, and log(min_p) is min-p's threshold.
    logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = _keep(logits, logits >= kth)
    if top_p is not None and top_p < 1:
        logits = _keep(logits, _in_nucleus(logits, top_p))
    if min_p:
        logits = _keep(logits, logits >= math.log(min_p))
    return logits.log_softmax(-1)


def draw(
    log_probability: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, f"rows {NUMBERS_PER_TOKEN}"]
) -> Int[Tensor, " rows"]:
    """One token per row, t with probability `exp(log_probability[t])`, made from numbers uniform in [0, 1).

    The vocabulary is halved until one token is left, and number i decides the i-th halving: by the share of the mass that each
    half has, summed in float64. Each of these log2(vocabulary) decisions turns over only where rounding moved that share across
    its number, so logits that differ by rounding give another token about as rarely as their distributions differ. (One number
    against the cumulated probabilities gives another token hundreds of times as often in a vocabulary of 50,000: its tail is
    tens of thousands of boundaries closer to each other than rounding moves them. Gumbel-max is as robust, but needs a number
    and a logarithm for each entry of the vocabulary.)

    Numbers have 24 bits, so each share is resolved to 6e-8. A token of probability 0 is never drawn; the probabilities of a row
    need not add up to 1.

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]]).log().expand(3, 3), torch.tensor([0.2, 0.5, 0.9])[:, None].expand(3, 32))
    tensor([0, 2, 2])
    """
    vocabulary = log_probability.shape[-1]
    depth = (vocabulary - 1).bit_length()
    levels = [pad(log_probability.double().exp(), (0, 2**depth - vocabulary))]
    for _ in range(depth):
        lower, upper = levels[-1].chunk(2, dim=-1)
        levels.append(lower + upper)
    token = torch.zeros_like(levels[-1], dtype=torch.int64)
    for level, number in zip(levels[-2::-1], uniform.double().split(1, dim=-1), strict=False):
        half = level.shape[-1] // 2
        lower, upper = level.gather(-1, token), level.gather(-1, token + half)
        token = token + half * (number * (lower + upper) >= lower)
    return token[:, 0]


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    return logits.masked_fill(~kept, -torch.inf)


def _in_nucleus(logits: Tensor, top_p: float) -> Tensor:
    descending, token = logits.detach().sort(dim=-1, descending=True, stable=True)
    probability = descending.softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    return torch.empty_like(logits, dtype=torch.bool).scatter(-1, token, mass_before < top_p)
