"""The text setting of the headline: a tiny Llama, and users who answer with label words through its head.

A user has sentences of two to four topics and a word for each topic. The prompt is the sentence and "Topic:"; the answer is the word,
one token among all of the vocabulary. The sentences are the first ones of docstrings of installed packages, and a topic is the
module that they describe; or they are queries of CLINC150, where it is on the disk, and a topic is an intent.

Users of the kind "private" draw words of their own: what is "graph" to one is "limit" to the next, nothing is shared, and the score is the
probability of the answers to the very sentences that a user was trained on, as for the invented authors of TOFU. Users of the kind
"shared" have other subsets of topics but the same word for a topic, and the score is the accuracy on unseen sentences (of other
docstrings), the answer being the likeliest of the user's words, as for Reddit and its options: there is something to learn from each other.

The base model is trained in the run, on sentences of other docstrings in the form of the prompt, with a word of the same docstring as
answer; of the users' docstrings it has seen none. All settings, the knobs of the baselines among them, were chosen on the seeds 100 and
101 with 20 users; the seeds that are reported chose nothing.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import bpe_tokenizer, prose
from siftmasks.comparison import compare
from siftmasks.examples import Example
from siftmasks.settings import SiftSettings
from siftmasks.task_setting import Knobs, Setting, one_thread
from siftmasks.trainable import trainable_names

Kind = Literal["private", "shared"]
COUNTS = (1, 2, 4, 8, 20, 40)
_ASK = "\nTopic:"
_SENTENCE = 16
"""Tokens of a sentence that are read; the rest is cut."""
_TRAIN: dict[Kind, int] = {"private": 8, "shared": 16}
_TEST = 16
"""How many sentences of a topic a user has."""
_MACHINERY = {"tests", "testing", "conftest", "distutils", "_lib", "utils"}
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model and how it is trained: `steps` of AdamW on `batch` sentences of docstrings of `packages`."""

    packages: tuple[str, ...] = ("numpy", "scipy", "networkx")
    vocab_size: int = 1024
    hidden_size: int = 64
    layers: int = 2
    steps: int = 150
    batch: int = 64
    learning_rate: float = 3e-3


def text(
    seed: int,
    *,
    kind: Kind = "private",
    clinc: Path | None = None,
    counts: Sequence[int] = COUNTS,
    fractions: Sequence[float] = (0.0, 0.5),
    densities: Sequence[float] = (),
    base: Base | None = None,
) -> dict[str, Any]:
    """Run the comparison for one seed, with one thread; JSON values, see `comparison.compare`.

    `accuracy` holds the mean probability of the answers (kind "private") or the accuracy on unseen sentences (kind "shared"). `clinc` is
    the file data_full.json of CLINC150, whose queries are then the users' sentences; the base model is the same.
    """
    setting = text_setting(seed, max(counts), kind=kind, clinc=clinc, base=base or Base())
    with one_thread():
        found = compare(setting, counts=counts, fractions=fractions, densities=densities)
    return {"seed": seed, "kind": kind, "source": "clinc" if clinc else "docstrings", **found}


@one_thread()
def text_setting(seed: int, tasks: int, *, kind: Kind, clinc: Path | None, base: Base) -> Setting:
    """Train the base model, with one thread, and draw the users."""
    documents, firsts = _docstrings(seed, base.packages)
    model, tokenizer, words = _pretrained(documents, base, seed)
    train, test = (firsts[::2], firsts[1::2]) if clinc is None else _queries(clinc)
    trained, tested = _users(seed, tasks, kind, _topics(train, test, tokenizer), words)
    return Setting(
        model=model, train=trained, test=trained if kind == "private" else tested, loss=_loss,
        accuracy=_answer_probability if kind == "private" else _choice_accuracy,
        settings=SiftSettings(learning_rate=5e-3, steps=20, seed=seed), trainable=trainable_names(model),
        central_rate=5e-3, central_batch=24,
        knobs=Knobs(task_arithmetic=4.0, ties_density=0.5, tall=3.0, consensus=4.0),
    )  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """Prompts to train with and others to test with."""

    train: list[list[int]]
    test: list[list[int]]


def _docstrings(seed: int, packages: Sequence[str]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """The sentences of each docstring of one half, for the base model; and of the other half the first ones, each with its module."""
    sources = prose(packages=packages)
    order = random.Random(f"{seed} docstrings").sample([*sources], len(sources))
    documents = [found for docstring in order[::2] if (found := sentences(docstring))]
    firsts = [(found[0], _module(sources[docstring])) for docstring in order[1::2] if (found := sentences(docstring))]
    return documents, [(sentence, module) for sentence, module in firsts if module]


def sentences(docstring: str) -> list[str]:
    """The plain sentences of 40 to 240 characters in the paragraphs of a docstring, without examples, lists and headings.

    >>> sentences("Keep the sum of all task vectors, on a grid.  Exact. ")
    ['Keep the sum of all task vectors, on a grid.']
    """
    paragraphs = [part for part in re.split(r"\n\s*\n", docstring) if not re.search(r">>>|::|\.\. |---|===", part)]
    found = [sentence for part in paragraphs for sentence in re.split(r"(?<=[.])\s+", " ".join(part.split()))]
    return [one for one in found if 40 <= len(one) <= 240 and sum(c.isalpha() or c == " " for c in one) > 0.85 * len(one)]


def _module(source: str) -> str | None:
    """The module of `path:line`, to two levels; none for tests and the machinery of packages."""
    parts = source.partition(":")[0].removesuffix(".py").split("/")
    return None if _MACHINERY.intersection(parts) else "/".join(parts[:2])


def _queries(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The queries of CLINC150 to train and to test with, each with its intent."""
    try:
        data = json.loads(path.read_text())
        train, test = ([(str(query), str(intent)) for query, intent in data[side]] for side in ("train", "test"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the data_full.json of CLINC150 ({error!r})") from None
    return train, test


def _topics(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Topic]:
    """Topics with enough prompts; no prompt is there twice, under one topic or two."""
    topics, seen = dict[str, Topic](), set[tuple[int, ...]]()
    for side, pairs in (("train", train), ("test", test)):
        for prompt, (_, topic) in zip(_prompts([sentence for sentence, _ in pairs], tokenizer), pairs, strict=True):
            if tuple(prompt) not in seen:
                seen.add(tuple(prompt))
                getattr(topics.setdefault(topic, Topic([], [])), side).append(prompt)
    return {name: topic for name, topic in sorted(topics.items()) if min(len(topic.train), len(topic.test)) >= _TEST}


def _prompts(sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    *asked, ask = tokenizer([*sentences, _ASK], add_special_tokens=False).input_ids
    return [ids[:_SENTENCE] + ask for ids in asked]


def _users(
    seed: int, tasks: int, kind: Kind, topics: Mapping[str, Topic], words: Sequence[int]
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Examples for training and testing by user: `prompt` (tokens), `answer` (a token) and `choices` (the user's words)."""
    word_of = dict(zip(topics, random.Random(f"{seed} words").sample(words, len(topics)), strict=True))
    train: dict[str, list[Example]] = {}
    test: dict[str, list[Example]] = {}
    for task in map("task{:03d}".format, range(tasks)):
        generator = random.Random(f"{seed} {task}")
        own = generator.sample([*topics], generator.randint(2, 4))
        choices = [word_of[topic] for topic in own] if kind == "shared" else generator.sample(words, len(own))
        for into, side, size in ((train, "train", _TRAIN[kind]), (test, "test", _TEST)):
            drawn = [
                {"prompt": prompt, "answer": answer, "choices": choices}
                for topic, answer in zip(own, choices, strict=True)
                for prompt in generator.sample(getattr(topics[topic], side), size)
            ]
            into[task] = [Example(f"{task}/{side}/{number}", fields) for number, fields in enumerate(drawn)]
    return train, test


def _loss(model: nn.Module, batch: Sequence[Example]) -> Tensor:
    return cross_entropy(_answer_logits(model, batch), _answers(batch))


def _answer_probability(model: nn.Module, examples: Sequence[Example]) -> float:
    probability = _answer_logits(model, examples).softmax(1)
    return probability.gather(1, _answers(examples)[:, None]).mean().item()


def _choice_accuracy(model: nn.Module, examples: Sequence[Example]) -> float:
    choices = torch.tensor([example.fields["choices"] for example in examples])
    likeliest = _answer_logits(model, examples).gather(1, choices).argmax(1, keepdim=True)
    return (choices.gather(1, likeliest)[:, 0] == _answers(examples)).float().mean().item()


def _answers(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.fields["answer"] for example in examples])


def _answer_logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Logits of the token after each prompt: [examples, vocabulary]. Padding on the right comes after all that they depend on."""
    llama, prompts = cast(Any, model), [torch.tensor(example.fields["prompt"]) for example in examples]
    hidden = llama.model(pad_sequence(prompts, batch_first=True)).last_hidden_state
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    logits: Tensor = llama.lm_head(hidden[torch.arange(len(prompts)), last])
    return logits


def _pretrained(
    documents: Sequence[Sequence[str]], base: Base, seed: int
) -> tuple[nn.Module, PreTrainedTokenizerFast, list[int]]:
    """Model and tokenizer, and the tokens that are words of at least three letters."""
    tokenizer = bpe_tokenizer([sentence + _ASK for document in documents for sentence in document], base.vocab_size)
    words = sorted(token for word, token in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", word))
    generator = random.Random(f"{seed} base")
    rows = [row for document in documents for row in _rows(document, tokenizer, {*words})]
    model = tiny_llama(
        vocab_size=len(tokenizer), hidden_size=base.hidden_size, layers=base.layers, max_positions=_SENTENCE + 8, seed=seed
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # drawn for a large model and long training (standard deviation 0.02)
                weight.mul_((0.3 if "embed" in name else weight.shape[1] ** -0.5) / 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), base.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 2 * (1 - step / base.steps), 1.0))
    for _ in range(base.steps):
        chosen = [generator.choice(rows) for _ in range(base.batch)]
        batch = [torch.tensor([*prompt, generator.choice(bag)]) for prompt, bag in chosen]
        inputs = pad_sequence([row[:-1] for row in batch], batch_first=True)
        targets = pad_sequence([row[1:] for row in batch], batch_first=True, padding_value=_IGNORED)
        optimizer.zero_grad()
        cross_entropy(model(inputs).logits.transpose(1, 2), targets, ignore_index=_IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return model.eval(), tokenizer, words


def _rows(document: Sequence[str], tokenizer: PreTrainedTokenizerFast, words: set[int]) -> list[tuple[list[int], list[int]]]:
    """The prompt of each sentence, with the words of the whole document that may be the answer."""
    prompts = _prompts(document, tokenizer)
    bag = sorted(words & {token for prompt in prompts for token in prompt})
    return [(prompt, bag) for prompt in prompts] if bag else []
