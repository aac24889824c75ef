"""Models that tasks are trained on: what an example means to a causal LM, a sequence-to-sequence LM and a sequence classifier."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.models import load_causal_lm, smollm2_folder
from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.trainable import trainable_names

Kind = Literal["causal", "seq2seq", "classifier"]
_ARCHITECTURES: dict[Kind, Any] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Answers:
    """The completion tokens of a batch, example after example; a classifier's label counts as one token.

    `logprob` float32 [tokens], nats: log p(token | prompt, tokens before). `likeliest` bool [tokens]: no token is more probable.
    `tokens`: how many of them each example has.
    """

    logprob: Tensor
    likeliest: Tensor
    tokens: list[int]


@dataclass(frozen=True)
class Trainee:
    """A model, its tokenizer, and what the fields of an example mean to them.

    - Causal LM: the tokens of the prompt (with those that the tokenizer puts around a text, such as bos), then those of the completion,
      tokenized by itself, then eos where the tokenizer has one. An empty prompt is the bos (or else the eos) token. Of text and label, the
      text is the prompt and the completion is the label's word after a space (no space if the text ends in white space or is empty):
      it goes through the LM head, no head is added.
    - Sequence to sequence: the encoder reads the prompt or text, the decoder writes the completion or the label's word, then eos.
    - Sequence classifier: text and label only; a label is a name in the config's `label2id` or the class's number.

    A prompt loses its beginning where the whole is longer than `max_length` tokens (the encoder's input by itself); completions are never
    cut. Batches are padded on the right. Raises (`loss`, `answers`): `UserError` naming the example that does not fit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    max_length: int

    def loss(self, model: nn.Module, examples: list[Example]) -> Tensor:
        """Return the mean of -log p over the completion tokens of all examples, in nats: what `sift` takes."""
        return -self.answers(model, examples).logprob.mean()

    def answers(self, model: nn.Module, examples: Sequence[Example]) -> Answers:
        """Return the log-probability of each completion token under `model`, differentiable."""
        forward: Callable[..., tuple[Tensor, Tensor, list[int]]]
        forward = {"causal": _causal, "seq2seq": _seq2seq, "classifier": _classifier}[self.kind]
        logits, target, tokens = forward(self, model, examples)
        logprob = -cross_entropy(logits.float(), target, reduction="none")
        likeliest = logits.gather(1, target[:, None])[:, 0] == logits.amax(1)
        return Answers(logprob, likeliest, tokens)


def load_trainee(base: str | Path, settings: SiftSettings) -> Trainee:
    """Load a base model, a folder, a Hub id or the packaged "smollm2", in `settings.dtype` and evaluation mode.

    The first of the config's `architectures` tells which kind it is. `max_length` is the least of the settings', the tokenizer's and the
    model's. Raises: `UserError` naming the folder and what in it is missing, truncated or of the wrong shape; for another architecture; for
    weights that are missing, such as a head that was never trained (no two tasks would start from the same); for trainable parameters
    that the checkpoint stores under other names than the model has, since names choose the signs.
    """
    with Checkpoint.open(smollm2_folder() if base == "smollm2" else base) as checkpoint:
        folder, stored = checkpoint.path, set(checkpoint.tensors)
    kind, dtype = _kind(folder), getattr(torch, settings.dtype)
    model, tokenizer = load_causal_lm(folder, dtype=dtype) if kind == "causal" else _load(folder, kind, dtype)
    renamed = [name for name in trainable_names(model, settings.freeze) if name not in stored]
    if renamed:
        raise UserError(
            f"{folder} has no tensor {renamed[0]} ({len(renamed)} such names): its weights are in another layout than transformers gives "
            "the model; save it once with save_pretrained of the model's own class"
        )
    tokenizer.truncation_side = "left"
    if kind == "classifier" and model.config.pad_token_id is None:
        model.config.pad_token_id = _pad(tokenizer)  # a decoder's classifier reads the last token that is none
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    return Trainee(model, tokenizer, kind, min(settings.max_length, tokenizer.model_max_length, positions))


def _kind(folder: Path) -> Kind:
    try:
        architectures = AutoConfig.from_pretrained(folder).architectures or ["none"]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from error
    for kind, names in _ARCHITECTURES.items():
        if architectures[0] in names.values():
            return kind
    raise UserError(
        f"{folder}/config.json names the architecture {architectures[0]}: expected one of transformers for causal language modelling, "
        "sequence to sequence or sequence classification"
    )


def _load(folder: Path, kind: Kind, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_causal_lm`, for the other kinds."""
    auto: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = auto.from_pretrained(folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from error
    faults = [f"tensor {name} is missing" for name in info["missing_keys"]]
    faults += [f"tensor {name} is {[*found]}, not {[*wanted]}" for name, found, wanted in info["mismatched_keys"]]
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        faults += [f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocabulary"]
    if kind == "classifier" and (model.config.num_labels < 2 or model.config.problem_type == "multi_label_classification"):
        faults += ["its head is not that of a classifier of one label among several"]
    if faults:
        raise UserError(f"{folder} does not fit its config.json: {min(faults)} ({len(faults)} such faults)")
    return model, tokenizer


def _causal(trainee: Trainee, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor, list[int]]:
    tokenizer, prompts, completions = trainee.tokenizer, [], []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stand_in = eos if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for example in examples:
        prompt, completion = _texts(example, separator=" ")
        completions.append(tokenizer(completion, add_special_tokens=False).input_ids + eos)
        prompts.append(_prompt(trainee, example, prompt, room=trainee.max_length - len(completions[-1])) or stand_in)
        if not prompts[-1]:
            raise UserError(
                f"example {example.id!r}: its prompt has no token, and the tokenizer neither bos nor eos to stand in for it"
            )
    inputs = _padded(trainee, model, [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    # Logits at position t are about token t + 1; those before the first completion are not needed.
    length, start = inputs["input_ids"].shape[1], min(map(len, prompts)) - 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = length - start
    logits = model(**inputs, use_cache=False).logits[:, start - length :]
    rows = [row for row, completion in enumerate(completions) for _ in completion]
    places = [
        len(prompt) - 1 - start + i
        for prompt, completion in zip(prompts, completions, strict=True)
        for i in range(len(completion))
    ]
    target = torch.tensor([token for completion in completions for token in completion], device=logits.device)
    return logits[rows, places], target, [*map(len, completions)]


def _seq2seq(trainee: Trainee, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor, list[int]]:
    tokenizer, prompts, completions = trainee.tokenizer, [], []
    for example in examples:
        prompt, completion = _texts(example, separator="")
        written = tokenizer(text_target=completion).input_ids
        if tokenizer.eos_token_id is not None and written[-1:] != [tokenizer.eos_token_id]:
            written.append(tokenizer.eos_token_id)
        if len(written) > trainee.max_length:
            raise _too_long(trainee, example, len(written))
        completions.append(torch.tensor(written))
        prompts.append(_prompt(trainee, example, prompt, room=trainee.max_length))
    inputs = _padded(trainee, model, prompts)
    labels = pad_sequence(completions, batch_first=True, padding_value=-100).to(inputs["input_ids"].device)
    logits = model(**inputs, labels=labels, use_cache=False).logits
    return logits[labels != -100], labels[labels != -100], [*map(len, completions)]


def _classifier(trainee: Trainee, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor, list[int]]:
    config: Any = trainee.model.config
    known, classes, target, prompts = config.label2id or {}, config.num_labels, [], []
    for example in examples:
        if "label" not in example.fields:
            raise UserError(
                f"example {example.id!r}: a sequence classifier needs text and label, not {' and '.join(example.fields)}"
            )
        label = example.fields["label"]
        number = known.get(label) if isinstance(label, str) else label
        if number is None or not 0 <= number < classes:
            names = ", ".join([*known][:8]) + (", ..." if len(known) > 8 else "")
            raise UserError(f"example {example.id!r}: the model has no class {label!r}; it has {names}, or 0 to {classes - 1}")
        target.append(number)
        prompts.append(_prompt(trainee, example, example.fields["text"], room=trainee.max_length))
    logits = model(**_padded(trainee, model, prompts)).logits
    return logits, torch.tensor(target, device=logits.device), [1] * len(target)


def _texts(example: Example, separator: str) -> tuple[str, str]:
    fields = example.fields
    if "completion" in fields:
        return fields["prompt"], fields["completion"]
    text = fields["text"]
    return text, f"{separator if text and not text[-1].isspace() else ''}{fields['label']}"


def _prompt(trainee: Trainee, example: Example, text: str, room: int) -> list[int]:
    """The last `room` tokens of a text, those that the tokenizer puts around it included."""
    if room < 1 + trainee.tokenizer.num_special_tokens_to_add():
        raise _too_long(trainee, example, trainee.max_length - room)
    return trainee.tokenizer(text, truncation=True, max_length=room).input_ids


def _too_long(trainee: Trainee, example: Example, tokens: int) -> UserError:
    return UserError(
        f"example {example.id!r}: its completion takes {tokens} of at most {trainee.max_length} tokens, and the prompt needs some: "
        "shorten it, or raise max_length if the model can read more"
    )


def _padded(trainee: Trainee, model: nn.Module, sequences: list[list[int]]) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(tokens) for tokens in sequences], batch_first=True, padding_value=_pad(trainee.tokenizer))
    lengths = torch.tensor([*map(len, sequences)])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
