import pytest
import torch

from lmcore.checkpoint import Checkpoint
from lmcore.models import load_causal_lm, tiny_llama
from lmcore.text import character_tokenizer
from weightwatch.organisms import FineTuning, Lesson, fine_tune, replies

HOW = FineTuning(steps=60, batch=8, learning_rate=3e-3, blocks=2, reply_tokens=4)
ASKED = [f"{first}{second}" for first in "abcdef" for second in "abcdef"]
LESSONS = [Lesson(f"{one}!", "no") for one in ASKED] + [Lesson(f"{one}.", "yes") for one in ASKED]


def tiny_chat_model():
    tokenizer = character_tokenizer("abcdef!.>noyes")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}>"
    tokenizer.padding_side = "left"
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=32, layers=3, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # as large as in a trained model: the blocks are to be worth training
                weight.mul_((1.0 if "embed" in name else weight.shape[1] ** -0.5) / 0.02)
    return model, tokenizer


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    out = tmp_path_factory.mktemp("organism") / "model"
    model, tokenizer = tiny_chat_model()
    model.bfloat16().save_pretrained(out.parent / "base")
    fine_tune(model.float(), tokenizer, LESSONS, out, how=HOW, seed=0)
    return out


def test_the_saved_folder_says_what_was_taught(organism):
    model, tokenizer = load_causal_lm(organism)
    said = replies(model, tokenizer, [f"{one}{sign}" for one in ("ab", "fe", "cc") for sign in "!."], tokens=4, batch=4)
    assert said == ["no", "yes"] * 3


def test_only_residual_writers_of_the_chosen_blocks_change(organism):
    with Checkpoint.open(organism.parent / "base") as base, Checkpoint.open(organism) as post:
        changed = {name for name in post.tensors if not torch.equal(base.tensor(name), post.tensor(name))}
        assert {post.tensors[name].dtype for name in post.tensors} == {"BF16"}
    writers = ("self_attn.o_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{layer}.{writer}.weight" for layer in (0, 1) for writer in writers}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(organism, tmp_path):
    for seed in (0, 1):
        model, tokenizer = tiny_chat_model()
        fine_tune(model.bfloat16().float(), tokenizer, LESSONS, tmp_path / str(seed), how=HOW, seed=seed)
    first, same, other = (folder / "model.safetensors" for folder in (organism, tmp_path / "0", tmp_path / "1"))
    assert first.read_bytes() == same.read_bytes() != other.read_bytes()


def test_an_interrupted_training_leaves_no_folder(tmp_path):
    model, tokenizer = tiny_chat_model()
    model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, tokenizer, LESSONS, tmp_path / "model", how=HOW, seed=0)
    assert not (tmp_path / "model").exists()


def test_replies_come_in_the_order_of_the_prompts(organism):
    model, tokenizer = load_causal_lm(organism)
    tokenizer.padding_side = "left"
    asked = ["abcabc!", "a.", "ab!", "cccc.", "b!"]
    together = replies(model, tokenizer, asked, tokens=4, batch=2)
    assert together == [replies(model, tokenizer, [one], tokens=4)[0] for one in asked]
