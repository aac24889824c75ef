"""Everything the headline measures for one seed: the world, SFT, WiSE-FT, decoding, votes and reinforcement learning."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from wiseft.arithmetic import TOKENIZER, Problems, StateDict, World, finetune, pretrain, split
from wiseft.decoding import Decoding
from wiseft.exact import ExactPassAtK, chain_log_probability, exact_pass_at_k
from wiseft.generation import Drawing, batches, complete, requests_for
from wiseft.interpolate import interpolate_
from wiseft.merging import merge
from wiseft.policy_gradient import policy_gradient
from wiseft.problems import Problem
from wiseft.votes import best_at_k, majority_at_k

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0)
DECODINGS = (
    *(Decoding(temperature=temperature) for temperature in (0.7, 1.0, 1.3, 1.6)),
    Decoding(top_k=3),
    Decoding(top_p=0.9),
    Decoding(top_p=0.95, temperature=1.3),
    Decoding(min_p=0.05),
    Decoding(min_p=0.05, temperature=1.6),
)
"""The settings of the claim about decoding; the temperatures are those of the paper."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; `early` is an epoch and `delta` the weight of its checkpoint."""

    world: World = field(default_factory=World)
    early: int = 6
    delta: float = 0.5
    every: int = 3
    """Epochs between checkpoints that are evaluated; early stopping chooses among those."""
    samples: int = 64
    voters: int = 16
    rl_steps: int = 1500
    rl_batch: int = 64
    rl_rate: float = 3e-5


def measure(settings: Settings, seed: int, folder: Path) -> Record:
    """Train and measure one world with one thread; its early, last and merged checkpoints are left in `folder`.

    Returns JSON values: `epochs` and `wise_epochs` (SFT checkpoints and their interpolation with the early one), `models` (base, early,
    last, early_stopping at the k = 64 of the claims, wise), `temperatures` and `decoding`, `equal_bias`, `success` (ρ of each problem),
    `votes` and `rl` (from last, wise and early_stopping). Records hold `pass_at_k` for `KS`, `bias` and `variance`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(settings, seed, folder)
    finally:
        torch.set_num_threads(threads)


def _measure(settings: Settings, seed: int, folder: Path) -> Record:
    world = settings.world
    train, test = split(world, seed)
    model = pretrain(world, seed)
    base = deepcopy(model)
    checkpoints = finetune(world, model, train, seed)
    early, last = checkpoints[settings.early], checkpoints[-1]

    def load(weights: StateDict) -> PreTrainedModel:
        model.load_state_dict(weights)
        return model

    epochs, wise_epochs = [], []
    for epoch in range(0, world.epochs + 1, settings.every):
        epochs.append({"epoch": epoch, **_record(exact(load(checkpoints[epoch]), test))})
        if epoch > settings.early:
            interpolate_(model, early, checkpoints[epoch], settings.delta)
            wise_epochs.append({"epoch": epoch, **_record(exact(model, test))})
    stopped = max(epochs[1:], key=lambda epoch: epoch["pass_at_k"][KS.index(64)])["epoch"]
    weights = {
        "base": checkpoints[0],
        "early": early,
        "early_stopping": checkpoints[stopped],
        "last": last,
        "wise": _merged_on_disk(model, early, last, settings.delta, folder),
    }
    found = {name: exact(load(state), test) for name, state in weights.items()}
    temperatures = [
        {"temperature": value, **_record(exact(load(last), test, Decoding(temperature=value)))} for value in TEMPERATURES
    ]
    decoding = [
        {"setting": _describe(chosen), **{name: _record(exact(load(weights[name]), test, chosen)) for name in ("last", "wise")}}
        for chosen in DECODINGS
    ]
    equal_bias = _at_bias(load(last), test, found["wise"].bias, temperatures)
    contestants = ("last", "early_stopping", "wise")
    votes = {name: _votes(load(weights[name]), base, test, settings, seed) for name in contestants}
    rl = None
    if settings.rl_steps:
        rl = {name: _reinforce(load(weights[name]), test, settings, seed) for name in contestants}
    return {
        "early_stopping_epoch": stopped,
        "epochs": epochs,
        "wise_epochs": wise_epochs,
        "models": {name: _record(result) for name, result in found.items()},
        "success": {name: found[name].success.tolist() for name in contestants},
        "temperatures": temperatures,
        "decoding": decoding,
        "equal_bias": equal_bias,
        "votes": votes,
        "rl": rl,
    }


def exact(model: PreTrainedModel, problems: Problems, decoding: Decoding | None = None) -> ExactPassAtK:
    """Exact Pass@k for all of `KS`."""
    return exact_pass_at_k(model, problems.prompts.tolist(), problems.chains.tolist(), KS, **asdict(decoding or Decoding()))


def _record(found: ExactPassAtK) -> Record:
    return {"pass_at_k": found.pass_at_k.tolist(), "bias": found.bias, "variance": found.variance}


def _merged_on_disk(model: PreTrainedModel, early: StateDict, last: StateDict, delta: float, folder: Path) -> StateDict:
    """Save both ends as real checkpoints, merge them as `wiseft merge` does, and load the result with transformers."""
    for name, weights in {"early": early, "last": last}.items():
        model.load_state_dict(weights)
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    merge(folder / "early", folder / "last", folder / "wise", delta=delta, overwrite=True)
    loaded: StateDict = AutoModelForCausalLM.from_pretrained(folder / "wise").state_dict()
    return loaded


def _at_bias(model: PreTrainedModel, test: Problems, bias: float, temperatures: Sequence[Record]) -> Record:
    """The temperature, found by bisection, at which the model has the given bias, or the nearest to it.

    Bias grows with temperature from the temperature of least bias on; if even that is above `bias`, it is what is compared with.
    """
    low = min(temperatures, key=lambda row: row["bias"])["temperature"]
    high = 10.0
    for _ in range(20):
        middle = (low + high) / 2
        if exact(model, test, Decoding(temperature=middle)).bias < bias:
            low = middle
        else:
            high = middle
    return {"temperature": low, **_record(exact(model, test, Decoding(temperature=low)))}


def _votes(model: PreTrainedModel, base: PreTrainedModel, test: Problems, settings: Settings, seed: int) -> dict[str, float]:
    """Sample, and judge final answers: Pass@1, majority vote@voters and Best@voters, all over the answers (not the whole chains).

    The answer is the last sum. Best@k takes the sample whose text is likeliest under the base model: a reward model that all contestants
    share, that has seen none of their training, and that costs no labels. It is a weak one: `oracle` is Best@voters with a perfect one.
    """
    texts = [test.text(problem) for problem in range(len(test.prompts))]
    problems = [Problem(str(number), prompt, _answer(chain) or "") for number, (prompt, chain) in enumerate(texts)]
    requests = requests_for(problems, TOKENIZER, n=settings.samples)
    answers: dict[str, list[str | None]] = {problem.id: [] for problem in problems}
    rewards: dict[str, list[float]] = {problem.id: [] for problem in problems}
    drawing = Drawing(decoding=Decoding(), seed=seed, max_new_tokens=test.chains.shape[1] + 1)
    for batch in batches(requests, 3200):
        drawn = complete(model, TOKENIZER, batch, drawing)
        chains = [[*TOKENIZER(one.text).input_ids, TOKENIZER.eos_token_id] for one in drawn]
        with torch.inference_mode():
            reward = chain_log_probability(base, [request.prompt for request in batch], chains).tolist()
        for request, one, value in zip(batch, drawn, reward, strict=True):
            answers[request.problem].append(_answer(one.text) if one.ended else None)
            rewards[request.problem].append(value)
    correct = [[given == problem.answer for given in answers[problem.id]] for problem in problems]
    k = settings.voters
    return {
        "pass_at_1": float(np.mean(correct)),
        "majority": float(majority_at_k([*answers.values()], correct, k).accuracy.mean()),
        "best": float(best_at_k([*rewards.values()], correct, k).mean()),
        "oracle": float(best_at_k(np.asarray(correct, dtype=float), correct, k).mean()),
    }


def _answer(chain: str) -> str | None:
    """The last sum of a chain; None where there is none."""
    return chain.rpartition(";")[2] or None


def _reinforce(model: PreTrainedModel, test: Problems, settings: Settings, seed: int) -> list[Record]:
    return policy_gradient(
        settings.world, model, test, steps=settings.rl_steps, batch=settings.rl_batch, rate=settings.rl_rate,
        every=max(settings.rl_steps // 30, 1), ks=KS, seed=seed,
    )  # fmt: skip


def _describe(decoding: Decoding) -> str:
    given: Iterable[tuple[str, Any]] = asdict(decoding).items()
    return ", ".join(f"{name} {value:g}" for name, value in given if value is not None)
