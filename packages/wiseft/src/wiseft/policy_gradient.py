"""Reinforcement learning in the arithmetic world, with the exact gradient of the expected reward."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from wiseft.arithmetic import Problems, World, fresh
from wiseft.exact import chain_log_probability, exact_pass_at_k


def policy_gradient(
    world: World,
    model: PreTrainedModel,
    test: Problems,
    *,
    steps: int,
    batch: int,
    rate: float,
    every: int,
    ks: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    """Maximise the expected reward E[ρ] over fresh problems, in place; return Pass@k on `test` along the way.

    The reward of a sample is 1 if its chain is correct, else 0. One chain is correct, so the expected reward of a problem is its
    success probability ρ, and the policy gradient `E[reward * grad log p(sample)]` is exactly `ρ * grad log ρ = grad ρ`: what REINFORCE or
    GRPO (without normalising by the standard deviation, without clipping or KL) estimates, with infinitely many samples of each problem. As
    there, a problem that the policy almost never solves teaches almost nothing. Each step draws `batch` new problems; the same seed
    draws the same ones. AdamW at a constant `rate`, no weight decay.

    Returns: one record before the first step and then after every `every` steps: `problems` (seen so far), `pass_at_k`, `bias`,
    `variance`.
    """
    generator = torch.Generator().manual_seed(2**33 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    curve = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            found = exact_pass_at_k(model, test.prompts.tolist(), test.chains.tolist(), ks)
            curve.append(
                {
                    "problems": step * batch,
                    "pass_at_k": found.pass_at_k.tolist(),
                    "bias": found.bias,
                    "variance": found.variance,
                }
            )
        if step == steps:
            break
        problems = fresh(world, batch, generator)
        success = chain_log_probability(model, problems.prompts.tolist(), problems.chains.tolist()).exp()
        optimizer.zero_grad()
        (-success.mean()).backward()
        optimizer.step()
    return curve
