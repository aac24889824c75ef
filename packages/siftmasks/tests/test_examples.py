"""Examples are read whole or refused by file and line, and batches do not depend on where an example stands."""

import gzip
import json
import random

import pytest

from lmcore.errors import UserError
from siftmasks.examples import Example, batches, read_examples
from siftmasks.settings import SiftSettings

EXAMPLES = [Example(f"e{i}", {"prompt": "p", "completion": str(i)}) for i in range(7)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids(steps):
    return [[example.id for example in step] for step in steps]


def test_both_kinds_are_read_with_ids_of_the_user_or_of_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "label": 3, "id": "mine"}, {"label": "x", "text": "ü", "other": [1]})
    first, second = read_examples(path)
    assert first == Example("mine", {"text": "t", "label": 3})
    assert second.fields == {"text": "ü", "label": "x"}
    same = write(tmp_path / "b.jsonl", {"text": "ü", "label": "x"})
    assert read_examples(same)[0].id == second.id
    pair = write(tmp_path / "c.jsonl", {"prompt": "ü", "completion": "x"})
    assert read_examples(pair)[0].id != second.id


def test_a_whole_number_is_an_id_by_its_digits(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "label": 3, "id": 5}, {"text": "u", "label": 3, "id": -12})
    assert [example.id for example in read_examples(path)] == ["5", "-12"]
    with pytest.raises(UserError, match="line 2: the id '5' is that of line 1 already"):
        read_examples(write(path, {"text": "t", "label": 3, "id": 5}, {"text": "u", "label": 3, "id": "5"}))


def test_a_gzipped_file_reads_like_the_plain_one(tmp_path):
    plain = write(tmp_path / "a.jsonl", {"text": "t", "label": 3}, {"text": "u", "label": 3})
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf\n" + plain.read_bytes() + b"\n \n"))
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes() + b"\n \n"))
    assert read_examples(packed) == read_examples(plain)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="packed: damaged or truncated gzip"):
        read_examples(packed)


def test_equal_contents_are_different_examples_wherever_they_stand(tmp_path):
    a, b = {"text": "a", "label": 0}, {"text": "b", "label": 0}
    one = read_examples(write(tmp_path / "one", a, b, a, a))
    other = read_examples(write(tmp_path / "other", a, a, b, a))
    assert len({example.id for example in one}) == 4
    assert sorted(one, key=lambda example: example.id) == sorted(other, key=lambda example: example.id)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "a"', "not JSON"),
        ('{"text": "\\ud800", "label": 1}', "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"text": "a"}', "needs prompt and completion, or text and label; it has text"),
        ('{"text": "a", "label": 1, "prompt": "a", "completion": "b"}', "needs prompt and completion, or text and label"),
        ('{"prompt": "a", "completion": "b"}', "has prompt and completion, the lines before have text and label"),
        ('{"text": 3, "label": 1}', "text is 3, not a string"),
        ('{"text": "a", "label": true}', "label is True, not a string or a whole number"),
        ('{"text": "a", "label": ""}', "the label is empty"),
        ('{"text": "a", "label": 1, "id": 7.5}', "id is 7.5, not a string with a character in it or a whole number"),
        ('{"text": "a", "label": 1, "id": true}', "id is true, not a string"),
        ('{"text": "a", "label": 1, "id": ""}', 'id is "", not a string'),
        ('{"text": "a", "label": 1, "id": "first"}', "the id 'first' is that of line 1 already"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a", "label": 1, "id": "first"}}\n\n{line}\n')
    with pytest.raises(UserError, match=rf"data\.jsonl, line 3: {complaint}"):
        read_examples(path)


def test_files_that_are_missing_or_empty_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl holds no example"):
        read_examples(tmp_path / "empty.jsonl")


def test_batches_do_not_depend_on_the_order_of_the_examples():
    settings = SiftSettings(steps=9, batch_size=3)
    shuffled = random.Random(0).sample(EXAMPLES, k=7)
    assert shuffled != EXAMPLES
    assert batches(shuffled, settings, "alice") == batches(EXAMPLES, settings, "alice")
    assert ids(batches(EXAMPLES, settings, "alice")) != ids(batches(EXAMPLES, settings, "bob"))
    assert ids(batches(EXAMPLES, settings, "alice")) != ids(
        batches(EXAMPLES, SiftSettings(steps=9, batch_size=3, seed=1), "alice")
    )


def test_every_epoch_takes_each_example_once_in_an_order_of_its_own():
    steps = ids(batches(EXAMPLES, SiftSettings(steps=14, batch_size=3), "alice"))
    assert [len(step) for step in steps] == [3] * 14
    stream = [name for step in steps for name in step]
    epochs = [stream[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == sorted(example.id for example in EXAMPLES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("batch_size", [None, 7, 100])
def test_full_batches_hold_all_examples_at_every_step(batch_size):
    steps = ids(batches(EXAMPLES, SiftSettings(steps=2, batch_size=batch_size), "alice"))
    assert [len(set(step)) for step in steps] == [7, 7]


def test_leaving_one_example_out_keeps_the_order_of_the_others():
    settings = SiftSettings(steps=1)
    (full,), (rest,) = (ids(batches(examples, settings, "alice")) for examples in (EXAMPLES, EXAMPLES[:2] + EXAMPLES[3:]))
    assert rest == [name for name in full if name != "e2"]


def test_no_examples_or_two_of_one_id_are_refused():
    with pytest.raises(UserError, match="'alice' has no example"):
        batches([], SiftSettings(), "alice")
    with pytest.raises(UserError, match="'alice' has the example 'e1' more than once"):
        batches([*EXAMPLES, EXAMPLES[1]], SiftSettings(), "alice")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("learning_rate", 0.0), ("steps", 0), ("bits", 17), ("beta2", 1.0), ("density", 0.0), ("batch_size", 0)],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(UserError, match=rf"{setting} is {value}"):
        SiftSettings(**{setting: value})
