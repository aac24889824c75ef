"""What an example means to each kind of model: checked against the model called by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from siftmasks.evaluation import score
from siftmasks.examples import Example
from siftmasks.models import Trainee, load_trainee
from siftmasks.settings import SiftSettings
from siftmasks.trainable import trainable_names

TOKENIZER = character_tokenizer("abcdefgh ")
VOCABULARY = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
SETTINGS = SiftSettings(max_length=12)
PAIRS = [
    Example("long", {"prompt": "abcabc", "completion": "dd"}),
    Example("short", {"prompt": "h", "completion": "aaa"}),
]
LABELLED = [Example("x", {"text": "ab", "label": "e"}), Example("y", {"text": "hgf ", "label": "fa"})]


def tiny_bert(cls=BertForSequenceClassification, **options):
    torch.manual_seed(0)
    names = {"id2label": {0: "e", 1: "fa", 2: "g"}, "label2id": {"e": 0, "fa": 1, "g": 2}} | options
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=10, **names,
    )  # fmt: skip
    return cls(config)


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=EOS,
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture
def load(tmp_path):
    def save_and_load(model, settings=SETTINGS) -> Trainee:
        model.save_pretrained(tmp_path)
        TOKENIZER.save_pretrained(tmp_path)
        return load_trainee(tmp_path, settings)

    return save_and_load


def ids(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


def by_hand(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The log-probabilities of a completion under a causal LM, one sequence without padding."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits, -1)[range(len(completion)), completion]


def test_a_causal_lm_learns_the_completion_and_eos_alone(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    answers = trainee.answers(trainee.model, PAIRS)
    expected = [by_hand(trainee.model, ids("abcabc"), [*ids("dd"), EOS]), by_hand(trainee.model, ids("h"), [*ids("aaa"), EOS])]
    assert answers.tokens == [3, 4]
    torch.testing.assert_close(answers.logprob, torch.cat(expected))
    torch.testing.assert_close(trainee.loss(trainee.model, PAIRS), -torch.cat(expected).mean())


def test_a_label_is_a_word_after_a_space_for_a_causal_lm(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    expected = [by_hand(trainee.model, ids("ab"), [*ids(" e"), EOS]), by_hand(trainee.model, ids("hgf "), [*ids("fa"), EOS])]
    torch.testing.assert_close(trainee.answers(trainee.model, LABELLED).logprob, torch.cat(expected))


def test_a_long_prompt_loses_its_beginning_and_a_completion_is_never_cut(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    found = trainee.answers(trainee.model, [Example("a", {"prompt": "a" * 20 + "bcdefgh", "completion": "ha"})])
    torch.testing.assert_close(found.logprob, by_hand(trainee.model, ids("aabcdefgh"), [*ids("ha"), EOS]))
    with pytest.raises(UserError, match="example 'a': its completion takes 12 of at most 12 tokens"):
        trainee.answers(trainee.model, [Example("a", {"prompt": "a", "completion": "a" * 11})])


def test_an_empty_prompt_is_the_bos_token(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    found = trainee.answers(trainee.model, [Example("a", {"prompt": "", "completion": "ha"})]).logprob
    torch.testing.assert_close(found, by_hand(trainee.model, [TOKENIZER.bos_token_id], [*ids("ha"), EOS]))


def test_a_sequence_to_sequence_model_writes_the_completion(load):
    trainee = load(tiny_t5())
    assert trainee.kind == "seq2seq"
    found = trainee.answers(trainee.model, PAIRS)
    expected = []
    for prompt, completion in (("abcabc", "dd"), ("h", "aaa")):
        target = [*ids(completion), EOS]
        logits = trainee.model(
            input_ids=torch.tensor([ids(prompt)]), decoder_input_ids=torch.tensor([[0, *target[:-1]]])
        ).logits[0]
        expected.append(log_softmax(logits, -1)[range(len(target)), target])
    torch.testing.assert_close(found.logprob, torch.cat(expected))
    words = trainee.answers(trainee.model, LABELLED)
    assert words.tokens == [2, 3], "the label's characters and eos, without a space"


def test_a_classifier_takes_names_and_numbers_of_classes(load):
    trainee = load(tiny_bert())
    assert (trainee.kind, trainee.max_length) == ("classifier", 10)
    found = trainee.answers(trainee.model, [*LABELLED, Example("z", {"text": "ab" * 40, "label": 2})])
    logits = [trainee.model(torch.tensor([ids(text)])).logits[0] for text in ("ab", "hgf ", "ab" * 5)]
    expected = [log_softmax(row, -1)[label] for row, label in zip(logits, (0, 1, 2), strict=True)]
    torch.testing.assert_close(found.logprob, torch.stack(expected))
    with pytest.raises(UserError, match="example 'q': the model has no class 'h'; it has e, fa, g, or 0 to 2"):
        trainee.answers(trainee.model, [Example("q", {"text": "a", "label": "h"})])
    with pytest.raises(
        UserError, match="example 'long': a sequence classifier needs text and label, not prompt and completion"
    ):
        trainee.answers(trainee.model, PAIRS)


def test_a_decoder_with_a_classifier_reads_its_last_token(load):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=3, bos_token_id=None)
    trainee = load(GPT2ForSequenceClassification(config))
    examples = [Example("x", {"text": "abcd", "label": 0}), Example("y", {"text": "a", "label": 1})]
    together = trainee.answers(trainee.model, examples).logprob
    alone = [trainee.answers(trainee.model, [example]).logprob for example in examples]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        (tiny_llama(vocab_size=9, hidden_size=16, tie=True), {"model.embed_tokens.weight"}),
        (tiny_llama(vocab_size=9, hidden_size=16, tie=False), {"model.embed_tokens.weight", "lm_head.weight"}),
        (tiny_t5(), {"shared.weight"}),
        (
            tiny_bert(),
            {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
            | {"classifier.weight", "classifier.bias"},
        ),
        (
            GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2)),
            {"transformer.wte.weight", "transformer.wpe.weight"},
        ),
    ],
    ids=["tied", "untied", "t5", "bert", "gpt2"],
)
def test_embeddings_and_head_are_frozen_and_nothing_else(model, frozen):
    assert {name for name, _ in model.named_parameters()} - set(trainable_names(model)) == frozen


def test_freeze_patterns_must_be_regular_expressions_that_match():
    model = tiny_llama(vocab_size=9, hidden_size=16)
    assert not [name for name in trainable_names(model, [r"norm|layers\.1\."]) if "norm" in name or ".1." in name]
    with pytest.raises(UserError, match=r"freeze has '\(', which is not a regular expression"):
        trainable_names(model, ["("])
    with pytest.raises(UserError, match="freeze has 'gone', which matches no parameter"):
        trainable_names(model, ["gone"])


def test_a_head_that_was_never_trained_is_refused(load):
    with pytest.raises(UserError, match=r"does not fit its config\.json: tensor .* is missing \(4 such faults\)"):
        load_as(load, tiny_bert(BertForMaskedLM), "BertForSequenceClassification")


def load_as(load, model, architecture):
    """Save a model whose config names another architecture, and load it."""
    save = model.save_pretrained

    def save_pretrained(folder):
        save(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architecture and [architecture]}))

    model.save_pretrained = save_pretrained
    return load(model)


@pytest.mark.parametrize("architecture", ["BertForQuestionAnswering", None])
def test_another_architecture_is_refused(load, architecture):
    with pytest.raises(UserError, match=rf"names the architecture {architecture or 'none'}: expected"):
        load_as(load, tiny_bert(), architecture)


def test_a_classifier_of_one_number_is_refused(load):
    with pytest.raises(UserError, match="its head is not that of a classifier"):
        load(tiny_bert(id2label={0: "score"}, label2id={"score": 0}))


def test_a_checkpoint_with_other_names_than_the_model_is_refused(load, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    load(model)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no tensor transformer\.h\.0\..*save it once with save_pretrained"):
        load_trainee(tmp_path, SETTINGS)


def test_a_truncated_model_is_refused(load, tmp_path):
    load(tiny_t5())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_trainee(tmp_path, SETTINGS)


def test_the_score_is_that_of_answers_one_by_one(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    trainee.model.train()
    one_by_one = [trainee.answers(trainee.model, [example]).logprob.detach() for example in PAIRS]
    found = score(trainee, PAIRS, batch_size=1)
    assert trainee.model.training
    assert found["answer_probability"] == pytest.approx(sum(float(row.mean().exp()) for row in one_by_one) / 2, rel=1e-5)
    assert found["loss"] == pytest.approx(-float(torch.cat(one_by_one).mean()), rel=1e-5)


def test_accuracy_is_greedy_decoding_of_the_completion(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16, seed=4))
    written = trainee.model.generate(torch.tensor([ids("abc")]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    assert EOS not in written
    optimist = Trainee(trainee.model, character_tokenizer("abcdefgh "), "causal", 12)
    optimist.tokenizer.eos_token = None
    right, wrong = TOKENIZER.decode(written), TOKENIZER.decode([*written[:2], (written[2] - 4) % 8 + 5])
    examples = [Example(text, {"prompt": "abc", "completion": text}) for text in (right, wrong)]
    assert score(optimist, examples)["accuracy"] == 0.5


def test_accuracy_among_labels_takes_the_most_probable_word(load):
    trainee = load(tiny_llama(vocab_size=VOCABULARY, hidden_size=16))
    labels = ["e", "fa", "g"]
    logprob = [by_hand(trainee.model, ids("ab"), [*ids(f" {label}"), EOS]).sum() for label in labels]
    best = labels[logprob.index(max(logprob))]
    examples = [Example(label, {"text": "ab", "label": label}) for label in labels]
    assert score(trainee, examples, labels=labels)["accuracy"] == pytest.approx(1 / 3)
    assert score(trainee, [example for example in examples if example.id == best], labels=labels)["accuracy"] == 1
    with pytest.raises(UserError, match="example 'g': its label 'g' is not among the labels"):
        score(trainee, examples, labels=["e", "fa"])


def test_an_empty_list_has_no_score(load):
    with pytest.raises(UserError, match="no example to score"):
        score(load(tiny_bert()), [])
