"""A small world of reasoning: additions with one correct chain of thought each, a sloppy base model, and its fine-tuning.

A problem is `27+58+34=` and its chain the running sums `085;119` and the end token, in a fixed format: one correct chain, so that
`wiseft.exact` gives Pass@k without sampling. The base model is pretrained on chains with a share of their digits replaced at random: it can
reason, diversely and carelessly. Supervised fine-tuning on few clean chains, for many epochs, then makes it confident: Pass@1 rises
and diversity collapses.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+=;")
_ZERO, _PLUS, _EQUALS, _THEN, _END = (TOKENIZER.get_vocab()[token] for token in ("0", "+", "=", ";", "<eos>"))
_SUM_DIGITS = 3

StateDict = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class World:
    """The task, the model and how it is trained; learning rates have a linear warm-up and decay as a cosine."""

    addends: int = 3
    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 2
    noise: float = 0.35
    """Share of the digits that pretraining replaces with a random one."""
    pretrain_steps: int = 3000
    pretrain_batch: int = 32
    pretrain_rate: float = 1e-3
    chains: int = 100
    """Clean chains for supervised fine-tuning."""
    epochs: int = 90
    batch: int = 16
    rate: float = 5e-4
    test_problems: int = 500


@dataclass(frozen=True)
class Problems:
    """Problems with their chains as token ids; all rows have one length."""

    prompts: Int[Tensor, "problems prompt"]
    chains: Int[Tensor, "problems chain"]

    def __getitem__(self, part: slice) -> "Problems":
        return Problems(self.prompts[part], self.chains[part])

    def text(self, problem: int) -> tuple[str, str]:
        """Prompt and chain in characters, the chain without its end token."""
        return str(TOKENIZER.decode(self.prompts[problem])), str(TOKENIZER.decode(self.chains[problem, :-1]))


def pose(addends: Int[Tensor, "problems addends"]) -> Problems:
    """Write additions of two-digit numbers out.

    >>> pose(torch.tensor([[27, 58, 34]])).text(0)
    ('27+58+34=', '085;119')
    """
    sums = addends.cumsum(1)[:, 1:]
    number, total = _digits(addends, 2), _digits(sums, _SUM_DIGITS)
    prompts = _separated(number, between=_PLUS, last=_EQUALS)
    chains = _separated(total, between=_THEN, last=_END)
    return Problems(prompts, chains)


def fresh(world: World, count: int, generator: torch.Generator) -> Problems:
    """Draw problems at random, with repetition (of 90^3 problems with three addends)."""
    return pose(torch.randint(10, 100, (count, world.addends), generator=generator))


def split(world: World, seed: int) -> tuple[Problems, Problems]:
    """Draw the distinct problems for fine-tuning and testing: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    wanted = world.chains + world.test_problems
    drawn = torch.randint(10, 100, (2 * wanted, world.addends), generator=generator)
    distinct = torch.tensor(list(dict.fromkeys(map(tuple, drawn.tolist())))[:wanted])
    return pose(distinct)[: world.chains], pose(distinct)[world.chains :]


def pretrain(world: World, seed: int) -> PreTrainedModel:
    """Train the base model on chains of which the share `noise` of the digits is replaced with random ones."""
    generator = torch.Generator().manual_seed(2**32 + seed)
    problems = fresh(world, world.pretrain_steps * world.pretrain_batch, generator)
    chains = problems.chains
    digit = (chains >= _ZERO) & (chains < _ZERO + 10)
    replaced = digit & (torch.rand(chains.shape, generator=generator) < world.noise)
    noisy = torch.where(replaced, _ZERO + torch.randint(0, 10, chains.shape, generator=generator), chains)
    model = tiny_llama(
        vocab_size=len(TOKENIZER), hidden_size=world.hidden_size, intermediate_size=world.intermediate_size, layers=world.layers,
        max_positions=64, tie=False, seed=seed,
    )  # fmt: skip
    _train(model, Problems(problems.prompts, noisy), epochs=1, batch=world.pretrain_batch, rate=world.pretrain_rate, seed=seed)
    return model


def finetune(world: World, model: PreTrainedModel, problems: Problems, seed: int) -> list[StateDict]:
    """Fine-tune on clean chains, in place; return the weights after each epoch, the base model's first."""
    recorder = _EpochRecorder()
    _train(model, problems, epochs=world.epochs, batch=world.batch, rate=world.rate, seed=seed, callbacks=[recorder])
    return recorder.checkpoints


def copy_weights(model: torch.nn.Module) -> StateDict:
    """Copy the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _train(
    model: PreTrainedModel,
    problems: Problems,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Teacher forcing with the loss on the chain."""
    ids = torch.cat([problems.prompts, problems.chains], 1)
    labels = torch.cat([torch.full_like(problems.prompts, -100), problems.chains], 1)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=rate, adam_beta2=0.98,
            lr_scheduler_type="cosine", warmup_steps=0.1 if epochs > 1 else 50, seed=seed, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=_stack, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class _EpochRecorder(TrainerCallback):
    """Keeps a copy of the weights from before the first epoch and after each."""

    def __init__(self) -> None:
        self.checkpoints: list[StateDict] = []

    def on_train_begin(self, *_: Any, **trained: Any) -> None:
        self.checkpoints.append(copy_weights(trained["model"]))

    def on_epoch_end(self, *_: Any, **trained: Any) -> None:
        self.checkpoints.append(copy_weights(trained["model"]))


def _digits(numbers: Int[Tensor, "problems numbers"], width: int) -> Int[Tensor, "problems numbers digits"]:
    powers = 10 ** torch.arange(width - 1, -1, -1)
    return _ZERO + numbers[..., None] // powers % 10


def _separated(digits: Int[Tensor, "problems numbers digits"], *, between: int, last: int) -> Int[Tensor, "problems tokens"]:
    """Join numbers with a separator, and end them with another token."""
    marks = torch.full((*digits.shape[:2], 1), between)
    marks[:, -1] = last
    return torch.cat([digits, marks], 2).flatten(1)
