"""Exact Pass@k, without sampling, where a problem has one correct chain of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from wiseft.decoding import filtered_log_softmax
from wiseft.passk import sample_orders

Tokens = Sequence[int]


@dataclass(frozen=True)
class ExactPassAtK:
    """What `exact_pass_at_k` computed; all float64. `log_success` is log ρ (nats) of each problem."""

    ks: tuple[int, ...]
    pass_at_k: Float[np.ndarray, " ks"]
    log_success: Float[np.ndarray, " problems"]

    @property
    def success(self) -> Float[np.ndarray, " problems"]:
        """Pass@1 of each problem, ρ."""
        return np.exp(self.log_success)

    @property
    def bias(self) -> float:
        """1 - E[ρ]."""
        return float(1 - self.success.mean())

    @property
    def variance(self) -> float:
        """Variance of ρ over these problems (divided by their number, so that Pass@2 = 1 - bias² - variance exactly)."""
        return float(self.success.var())


def exact_pass_at_k(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    chains: Sequence[Tokens],
    ks: int | Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    batch_size: int = 256,
) -> ExactPassAtK:
    """Pass@k over problems of which each has a unique correct chain: `mean(1 - (1 - ρ)^k)` with `ρ = exp(Σ log p(chain token))`.

    `prompts` and `chains` hold token ids, one pair per problem, of any lengths; a chain ends with the end token where the answer must end
    there. One teacher-forced pass, whatever the number of ks: no sampling, hence no sampling error. The decoding settings are those of
    `wiseft.decoding.filtered_log_softmax`; a filter that removes a token of the chain makes ρ zero. Log-probabilities are float64, and
    `1 - (1 - ρ)^k` keeps its relative precision down to the smallest ρ (`-expm1(k log1p(-ρ))`).

    >>> from lmcore.models import tiny_llama
    >>> found = exact_pass_at_k(tiny_llama(vocab_size=4), prompts=[[1, 2]], chains=[[3, 0]], ks=[1, 16, 256])
    >>> found.pass_at_k.round(1)  # an untrained model guesses two tokens of four
    array([0. , 0.3, 1. ])

    Returns: Pass@k for each of `ks` and ρ for each problem. Memory: `batch_size` x chain length x vocabulary in float64.
    Raises: `ValueError` naming the problem with an empty prompt or chain, for unequal numbers of both, and for k < 1.
    Source: the definition of Pass@k; the shortcut holds only for a unique chain.
    """
    orders = sample_orders(ks)
    with torch.inference_mode():
        parts = [
            chain_log_probability(
                model, prompts[start : start + batch_size], chains[start : start + batch_size],
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            )
            for start in range(0, max(len(prompts), len(chains)), batch_size)
        ]  # fmt: skip
    log_success = torch.cat(parts).cpu().numpy()
    return ExactPassAtK(tuple(orders.tolist()), pass_at_k_of(log_success, orders), log_success)


def pass_at_k_of(log_success: Float[np.ndarray, " problems"], ks: Sequence[int] | np.ndarray) -> Float[np.ndarray, " ks"]:
    """Mean over problems of `1 - (1 - ρ)^k` from log ρ (nats, <= 0).

    >>> pass_at_k_of(np.log([0.5, 0.25]), [1, 2])
    array([0.375  , 0.59375])
    """
    with np.errstate(divide="ignore"):  # ρ = 1 fails with probability exp(-inf), as it should
        near_one = np.log(-np.expm1(log_success))
        log_failure = np.where(log_success > -1, near_one, np.log1p(-np.exp(log_success)))
    return -np.expm1(np.asarray(ks)[:, None] * log_failure).mean(1)


def chain_log_probability(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    chains: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Tensor, " problems"]:
    """Log-probability (nats, float64, differentiable) of each chain after its prompt, `Σ log p(chain token)`, in one forward pass.

    Rows are padded on the right, where a causal model cannot see. Raises: as `exact_pass_at_k`.
    """
    rows = [[*prompt, *chain] for prompt, chain in zip(prompts, chains, strict=True)]
    for problem, (prompt, chain) in enumerate(zip(prompts, chains, strict=True)):
        if not len(prompt) or not len(chain):
            raise ValueError(
                f"problem {problem} has {len(prompt)} prompt tokens and {len(chain)} chain tokens: at least 1 of each"
            )
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    position = torch.arange(tokens.shape[1])
    start = torch.tensor([len(prompt) for prompt in prompts])
    in_chain = (position >= start[:, None]) & (position < lengths[:, None])
    real = position < lengths[:, None]

    device = model.device
    tokens, in_chain, real = tokens.to(device), in_chain.to(device), real.to(device)
    logits = model(input_ids=tokens[:, :-1], attention_mask=real[:, :-1].long(), use_cache=False).logits
    row_of, at = in_chain.nonzero(as_tuple=True)
    filtered = filtered_log_softmax(
        logits[row_of, at - 1].double(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    chosen = filtered.gather(-1, tokens[row_of, at][:, None])[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64, device=device).index_add(0, row_of, chosen)
