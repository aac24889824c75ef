"""How well a model answers a task's examples."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lmcore.errors import UserError
from siftmasks.examples import Example
from siftmasks.models import Trainee


def score(
    trainee: Trainee, examples: Sequence[Example], *, labels: Sequence[str | int] | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Score the model that `trainee` holds, as it is now (for instance with a task's weights in it), in evaluation mode.

    - `answer_probability`: the mean over examples of exp(mean log p per completion token), TOFU's metric;
    - `loss`: the mean of -log p over all completion tokens, in nats;
    - `accuracy`: with `labels`, the share of examples whose label has the highest log p among them (of its whole word and eos; the first of
      equals); without, the share whose every completion token is the likeliest one (greedy decoding writes just that completion,
      a classifier chooses just that class).

    Raises: `UserError` if there is no example, or with `labels` one that has no label or a label that is not among them.
    """
    if not examples:
        raise UserError("there is no example to score")
    logprob, hit = _answers(trainee, examples, batch_size)
    if labels is not None:
        hit = _chosen(trainee, examples, labels, batch_size)
    tokens = torch.cat(logprob)
    return {
        "answer_probability": float(torch.stack([row.mean().exp() for row in logprob]).mean()),
        "accuracy": sum(hit) / len(hit),
        "loss": float(-tokens.mean()),
    }


def _chosen(trainee: Trainee, examples: Sequence[Example], labels: Sequence[str | int], batch_size: int) -> list[bool]:
    for example in examples:
        if example.fields.get("label") not in labels:
            raise UserError(f"example {example.id!r}: its label {example.fields.get('label')!r} is not among the labels given")
    asked = [replace(example, fields={**example.fields, "label": label}) for example in examples for label in labels]
    logprob, _ = _answers(trainee, asked, batch_size)
    total = torch.stack([row.sum() for row in logprob]).view(len(examples), len(labels))
    return [labels[place] == example.fields["label"] for place, example in zip(total.argmax(1).tolist(), examples, strict=True)]


def _answers(trainee: Trainee, examples: Sequence[Example], batch_size: int) -> tuple[list[torch.Tensor], list[bool]]:
    """Log p (float64) of the completion tokens of each example, and whether all of them are the likeliest."""
    model, logprob, hit = trainee.model, [], []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                answers = trainee.answers(model, examples[start : start + batch_size])
                logprob += answers.logprob.double().split(answers.tokens)
                hit += [bool(row.all()) for row in answers.likeliest.split(answers.tokens)]
    finally:
        for module, training in modes:
            module.training = training
    return logprob, hit
