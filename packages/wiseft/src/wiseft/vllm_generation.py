"""The functions of `wiseft.generation` for a `vllm.LLM`. Not tested: vLLM was not at hand where this was written.

The random numbers are vLLM's own, one seed per request, made from (seed, problem, sample): a sample does not depend on its
place in the batch as far as vLLM promises that, and differs from the one that `generation` draws. vLLM applies min-p before
top-k and top-p.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmcore.errors import UserError
from lmcore.random import key
from wiseft.generation import Completion, Drawing, Request


def load(source: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the `vllm.LLM` of a folder or Hub id, and its tokenizer. Raises: `UserError` where vLLM is not installed."""
    try:
        from vllm import LLM
    except ImportError:
        raise UserError("--engine vllm needs vLLM: install it as its documentation says") from None
    llm = LLM(model=source, dtype=dtype)
    return llm, llm.get_tokenizer()


def batches(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Return the requests in their order, `batch_size` at a time: vLLM schedules prompts of any length together."""
    return [list(requests[start : start + batch_size]) for start in range(0, len(requests), batch_size)]


def complete(model: Any, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], drawing: Drawing) -> list[Completion]:
    """Draw one batch; `score` is vLLM's cumulative log-probability, that of the model itself unless `logprobs_mode` was changed."""
    from vllm import SamplingParams

    decoding = drawing.decoding
    settings = {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k or -1,
        "top_p": decoding.top_p or 1.0,
        "min_p": decoding.min_p or 0.0,
        "max_tokens": drawing.max_new_tokens,
        "logprobs": 0,  # that of the token drawn alone
    }
    prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
    seeds = [key(drawing.seed, request.stream)[0] for request in requests]
    outputs = model.generate(prompts, [SamplingParams(seed=seed, **settings) for seed in seeds], use_tqdm=False)
    drawn = [output.outputs[0] for output in outputs]
    return [Completion(one.text, len(one.token_ids), one.finish_reason == "stop", one.cumulative_logprob) for one in drawn]


def identity(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the name under which vLLM loaded the model; unlike `generation.identity` it does not look at the weights."""
    return {"engine": "vllm", "weights": model.llm_engine.model_config.model}
