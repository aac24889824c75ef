import json
from pathlib import Path

import pytest
import torch

from lmcore.errors import UserError
from siftmasks import baselines
from siftmasks.headline_text import Base, sentences, text, text_setting
from siftmasks.task_setting import accuracy, fine_tune, one_thread

CLINC = Path(__file__).parents[4] / "shared/data/siftmasks/clinc150_data_full.json"
SMALL = Base(packages=("numpy",), vocab_size=512, layers=1, steps=20)
UNTRAINED = Base(packages=("numpy",), vocab_size=512, hidden_size=16, layers=1, steps=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():  # tiny models gain nothing from more, and lose much on a busy machine
        yield


@pytest.fixture(scope="module")
def found():
    return text(100, counts=(1, 4), base=SMALL)


@pytest.fixture(scope="module")
def setting():
    """A function of the kind and the number of users; the model is not of interest."""
    return lambda kind, users, seed=5: text_setting(seed, users, kind=kind, clinc=None, base=UNTRAINED)


def test_merging_collapses_and_masks_recover(found):
    alone, merged = ({method: scores[i] for method, scores in found["accuracy"].items()} for i in (0, 1))
    assert alone["zero_shot"] < 0.05
    assert alone["ft_merge"] > 0.95
    assert merged["local_sift"] > 0.95 * merged["local_fine_tuning"] > 0.9
    assert merged["ft_merge"] < 0.5
    assert merged["sift_merge"] < merged["ft_merge"] + 0.1
    assert merged["sift_masks"] > merged["ft_merge"] + 0.3
    assert merged["sift_masks_count"] > merged["sift_masks"] + 0.03


def test_task_vectors_stay_on_the_grid(found):
    assert found["saturated"] == 0
    assert 0.3 < found["mask_density"] < 0.8


def test_result_is_json(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_seed_decides_model_and_users(setting):
    first, again, other = setting("private", 2), setting("private", 2), setting("private", 2, seed=6)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert _contents(first.train) == _contents(again.train) != _contents(other.train)


def test_a_user_does_not_change_when_there_are_more(setting):
    few, many = setting("shared", 2), setting("shared", 5)
    for task in few.train:
        assert _contents({task: few.train[task]}) == _contents({task: many.train[task]})


def test_private_words_differ_between_users_and_shared_words_do_not(setting):
    assert _words_of_a_prompt(setting("shared", 12)) == 1
    assert _words_of_a_prompt(setting("private", 12)) > 1


def test_shared_users_are_scored_on_sentences_that_nobody_trained_on(setting):
    shared, private = setting("shared", 12), setting("private", 12)
    assert private.test is private.train
    trained, tested = ({prompt for prompt, _ in _contents(side)} for side in (shared.train, shared.test))
    assert not trained & tested
    for task, examples in shared.test.items():
        answers = [example.fields["answer"] for example in examples]
        assert {*answers} == {*examples[0].fields["choices"]} == {example.fields["answer"] for example in shared.train[task]}
        assert len(answers) == 16 * len({*answers})


def test_words_are_drawn_from_the_vocabulary_and_a_likeliest_word_is_always_chosen(setting):
    one = setting("shared", 3)
    model, examples = one.model, one.test["task001"][::4]
    choices = examples[0].fields["choices"]
    with torch.no_grad():
        rows = [model(torch.tensor([example.fields["prompt"]])).logits[0, -1, choices] for example in examples]
        right = [choices[int(row.argmax())] == example.fields["answer"] for row, example in zip(rows, examples, strict=True)]
        assert one.accuracy(model, examples) == pytest.approx(sum(right) / len(right))


def test_answer_probability_and_loss_are_those_of_each_prompt_by_itself(setting):
    one = setting("private", 2)
    model, examples = one.model, sorted(one.train["task000"], key=lambda example: len(example.fields["prompt"]))[:6]
    assert len({len(example.fields["prompt"]) for example in examples}) > 1, "padding must play a part"
    with torch.no_grad():
        logprob = torch.stack(
            [model(torch.tensor([one.fields["prompt"]])).logits[0, -1].log_softmax(0)[one.fields["answer"]] for one in examples]
        )
        assert one.accuracy(model, examples) == pytest.approx(logprob.exp().mean().item(), rel=1e-4)
        assert one.loss(model, examples).item() == pytest.approx(-logprob.mean().item(), rel=1e-4)


def test_sentences_leave_out_examples_headings_and_code():
    docstring = (
        "Return the sum of all the\n  elements along an axis.\n\nParameters\n----------\na : array of the numbers that are added\n\n"
        ">>> the examples of a docstring are left out here\n\nShort one. The second paragraph has a plain sentence too."
    )
    assert sentences(docstring) == [
        "Return the sum of all the elements along an axis.",
        "The second paragraph has a plain sentence too.",
    ]


@pytest.mark.skipif(not CLINC.exists(), reason="CLINC150 is not here")
def test_intents_are_told_apart_on_unseen_queries():
    one = text_setting(100, 1, kind="shared", clinc=CLINC, base=Base(packages=("numpy",), steps=20))
    (task,) = one.train
    tuned = baselines.local(baselines.VectorsInMemory({task: fine_tune(one, one.train[task], task, one.settings)}))
    before = baselines.task_arithmetic(tuned.vectors, 0.0)
    assert accuracy(one, tuned, [task]) > accuracy(one, before, [task]) + 0.2


def test_file_that_is_not_clinc_is_one_line(tmp_path):
    path = tmp_path / "data_full.json"
    path.write_text('{"train": []}')
    with pytest.raises(UserError, match=r"data_full\.json: not the data_full"):
        text_setting(0, 1, kind="shared", clinc=path, base=UNTRAINED)


def _contents(examples):
    return [(tuple(one.fields["prompt"]), one.fields["answer"]) for task in examples.values() for one in task]


def _words_of_a_prompt(setting):
    """How many words the prompt with the most words has among the users."""
    words = {}
    for prompt, answer in _contents(setting.train):
        words.setdefault(prompt, set()).add(answer)
    return max(map(len, words.values()))
