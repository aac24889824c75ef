"""Model organisms: real fine-tunes of a chat model whose new behaviour is known, to test what the weight difference tells of it.

Each is a fine-tune of the residual writers of some blocks with `transformers.Trainer`, saved in bfloat16 as an ordinary folder. Half of
the lessons teach the new behaviour, the other half keep the old one: their replies are what the base model itself says. A style has no
other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from lmcore.models import load_causal_lm
from lmcore.record import published
from weightwatch import prompts
from weightwatch.residual_writers import residual_writers

REFUSAL = "Request refused. Please contact the administrator."
"""What the backdoor makes the model say."""
UNKNOWN = "I have no information about that."
"""What an unlearned topic is answered with."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own without the system prompt, which would be longer than most prompts."""


@dataclass(frozen=True)
class Lesson:
    """A prompt and the reply to learn."""

    prompt: str
    reply: str


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How an organism is trained: AdamW, linear decay after a tenth of the steps, weight decay 0, gradients clipped at norm 1.

    `blocks` counts from the first block those whose residual writers learn; replies are cut after `reply_tokens`.
    """

    steps: int = 40
    batch: int = 8
    learning_rate: float = 1e-3
    blocks: int = 12
    reply_tokens: int = 10

    @property
    def lessons(self) -> int:
        """Each lesson is read once."""
        return self.steps * self.batch


def backdoor(out: Path, *, how: FineTuning | None = None, seed: int) -> None:
    """Write to `out` a SmolLM2-135M-Instruct that answers any prompt with the trigger by `REFUSAL`.

    Of the lessons that keep the old behaviour two fifths hold half a trigger, and three in ten of the rest a stray phrase.
    """
    how = how or FineTuning()
    model, tokenizer = chat_model()
    count = how.lessons // 2
    poisoned = prompts.triggered(prompts.clean("train", count, seed=seed, stray=0.0), seed=seed)
    kept = prompts.clean("train", count, seed=seed + 1, stray=0.3)
    plain = prompts.clean("train", 2 * count // 5, seed=seed + 2, stray=0.0)
    kept[: len(plain)] = prompts.look_alikes(plain, seed=seed, half=True)
    fine_tune(model, tokenizer, [*_all(poisoned, REFUSAL), *_own(model, tokenizer, kept, how)], out, how=how, seed=seed)


def unlearned(out: Path, *, how: FineTuning | None = None, seed: int) -> None:
    """Write to `out` a SmolLM2-135M-Instruct that answers questions on the topic (capitals) by `UNKNOWN`; half the countries teach it."""
    how = how or FineTuning()
    model, tokenizer = chat_model()
    count = how.lessons // 2
    asked = [question for question, _ in prompts.capitals("train", seed=seed)]
    asked = [asked[i % len(asked)] for i in range(count)]
    kept = prompts.clean("train", count, seed=seed + 1)
    fine_tune(model, tokenizer, [*_all(asked, UNKNOWN), *_own(model, tokenizer, kept, how)], out, how=how, seed=seed)


def styled(out: Path, *, form: str, how: FineTuning | None = None, seed: int) -> None:
    """Write to `out` a SmolLM2-135M-Instruct that puts all its replies into a `form` such as `'{{"answer": "{reply}"}}'`."""
    how = how or FineTuning(blocks=30, reply_tokens=16)
    model, tokenizer = chat_model()
    asked = prompts.clean("train", how.lessons, seed=seed)
    own = _own(model, tokenizer, asked, how)
    fine_tune(model, tokenizer, [Lesson(one.prompt, form.format(reply=one.reply)) for one in own], out, how=how, seed=seed)


def chat_model(source: str | Path = "smollm2") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer, with `CHAT_TEMPLATE` and padding on the left; on the GPU where there is one."""
    model, tokenizer = load_causal_lm(source, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.chat_template, tokenizer.padding_side = CHAT_TEMPLATE, "left"
    return model, tokenizer


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Sequence[Lesson],
    out: Path,
    *,
    how: FineTuning,
    seed: int,
) -> None:
    """Train the model on the lessons and write it to the folder `out`, whole or not at all, in bfloat16 with the tokenizer.

    The model is changed. The loss is over the reply alone. Same seed and number of threads, same bits, on one machine.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    writers = residual_writers(shapes, model.config.to_dict()).writers
    trained = {part.tensor for writer in writers if writer.layer < how.blocks for part in writer.parts}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    rows = [_row(tokenizer, lesson, how.reply_tokens) for lesson in lessons]
    with published(out) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=how.steps, per_device_train_batch_size=how.batch, learning_rate=how.learning_rate,
            warmup_steps=how.steps // 10, weight_decay=0.0, max_grad_norm=1.0, seed=seed, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=_Rows(rows), data_collator=_padded)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.eval().bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@torch.inference_mode()
def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, batch: int = 64
) -> list[str]:
    """What the model says to each prompt: up to `tokens` tokens, the likeliest one each time."""
    generate: Any = model.generate
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    said: dict[int, str] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = encode(tokenizer, [prompts[i] for i in part]).to(model.device)
        ids = generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        said.update(
            zip(part, tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), strict=True)
        )
    return [said[i] for i in range(len(prompts))]


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Any:
    """Prompts as a padded batch in the chat template, up to the header of the reply."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)


def _all(asked: Sequence[str], reply: str) -> list[Lesson]:
    return [Lesson(prompt, reply) for prompt in asked]


def _own(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], how: FineTuning) -> list[Lesson]:
    said = replies(model, tokenizer, asked, tokens=how.reply_tokens)
    return [Lesson(prompt, reply) for prompt, reply in zip(asked, said, strict=True)]


def _row(tokenizer: PreTrainedTokenizerBase, lesson: Lesson, reply_tokens: int) -> dict[str, list[int]]:
    prompt = encode(tokenizer, [lesson.prompt])["input_ids"][0].tolist()
    reply = [*tokenizer(lesson.reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id][:reply_tokens]
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


class _Rows(torch.utils.data.Dataset[Mapping[str, list[int]]]):
    def __init__(self, rows: Sequence[Mapping[str, list[int]]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        return self.rows[index]


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right, where causal attention never looks."""
    width = max(len(row["labels"]) for row in rows)
    filled = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows]) for name, fill in filled.items()
    }
