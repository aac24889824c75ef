"""The schema says what can be known of a model and what is measured."""

import pytest

from scaling_meta import schema
from scaling_meta.schema import BENCHMARKS, FIELDS, is_missing


def test_features_are_the_papers():
    assert schema.SCALING == ("log_params", "log_tokens")
    assert [name for name in schema.ARCHITECTURE if not FIELDS[name].categories] == [
        "dimension", "num_heads", "mlp_ratio", "sequence_length",
    ]  # fmt: skip
    assert len(schema.ARCHITECTURE) == 10
    assert tuple(f"share_{name}" for name in ("web", "code", "books", "reference", "academic", "english")) == schema.DATA
    assert len(set(schema.GENERATION)) == 61
    assert set(schema.DESIGN) - set(schema.SCALING) <= FIELDS.keys()


def test_categories_are_in_the_order_that_the_papers_encoder_gives_them():
    """An ordinal encoder sorts; trees on its codes see the same splits as on ours."""
    for field in FIELDS.values():
        assert list(field.categories) == sorted(field.categories)


def test_benchmarks_are_the_papers_thirteen():
    shots = {"arc_challenge": 25, "hellaswag": 10, "mmlu_5shot": 5, "winogrande": 5, "gsm8k": 5}
    assert len(BENCHMARKS) == 13
    assert {name: of.shots for name, of in BENCHMARKS.items() if of.shots} == shots
    assert [name for name, of in BENCHMARKS.items() if of.better == "lower"] == ["xnli", "anli", "mathqa", "logiqa2"]
    assert {name: len(of.tasks) for name, of in BENCHMARKS.items() if len(of.tasks) > 1} == {
        "mmlu_0shot": 57, "mmlu_5shot": 57, "truthfulqa": 2, "lambada": 2, "xnli": 15, "anli": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("share_code", "-1", "-1 is not between 0 and 100"),
        ("share_code", "101", "101 is not between 0 and 100"),
        ("params", "-7e9", "-7e9 is not at least 1"),
        ("params", "inf", "inf is not at least 1"),
        ("dimension", "wide", "'wide' is not a number"),
        ("activation", "tanh", "'tanh' is none of geglu, gelu,"),
    ],
)
def test_a_field_refuses_what_it_cannot_be(field, text, message):
    with pytest.raises(ValueError, match=message):
        FIELDS[field].parse(text)


def test_zero_is_a_value_and_unknown_is_missing():
    assert FIELDS["share_code"].parse("0") == 0.0
    assert FIELDS["biases"].parse("none") == "none"
    assert not any(map(is_missing, ("0", "0.0", "none", "100")))
    assert all(map(is_missing, ("", " ", "unknown", "Unknown", "nan", "-1", "-1.0", "null")))
