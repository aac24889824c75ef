"""The filtered distribution is that of transformers, and tokens are drawn with its probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmcore.errors import UserError
from lmcore.random import uniform
from wiseft.decoding import NUMBERS_PER_TOKEN, Decoding, draw, filtered_log_softmax


@given(
    temperature=st.sampled_from([0.25, 0.8, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.99),
    min_p=st.none() | st.floats(0.001, 1.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_filters_keep_and_weigh_the_tokens_that_those_of_transformers_do(temperature, top_k, top_p, min_p, seed):
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    for setting, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
        expected = expected if setting is None else warper(setting)(None, expected)
    found = filtered_log_softmax(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_top_p_sees_the_distribution_that_top_k_renormalised():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Alone, top-p 0.5 keeps two tokens; after top-k 2 the first has 4/7 of the mass, which is enough.
    assert filtered_log_softmax(logits, top_p=0.5).isfinite().sum() == 2
    assert filtered_log_softmax(logits, top_k=2, top_p=0.5).isfinite().sum() == 1


def test_temperature_0_is_the_limit_of_small_temperatures():
    logits = torch.randn(3, 4, 17)
    greedy = filtered_log_softmax(logits, temperature=0.0, top_k=5, top_p=0.1)
    assert torch.equal(greedy.exp(), torch.nn.functional.one_hot(logits.argmax(-1), 17).float())
    assert torch.equal(filtered_log_softmax(logits, temperature=1e-30).exp(), greedy.exp())


def test_of_equal_tokens_top_p_keeps_the_lower_id():
    assert filtered_log_softmax(torch.zeros(4), top_p=0.5).isfinite().tolist() == [True, True, False, False]


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(2, 1000, dtype=torch.bfloat16)
    found = filtered_log_softmax(logits, temperature=0.7, top_p=0.9)
    assert found.dtype == torch.float32
    assert torch.equal(found, filtered_log_softmax(logits.float(), temperature=0.7, top_p=0.9))


def test_gradient_is_that_of_the_softmax_over_the_kept_tokens():
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    found = filtered_log_softmax(logits, temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
    kept = found.isfinite()
    (gradient,) = torch.autograd.grad(found[kept].sum(), logits)
    alone = logits.detach()[kept].requires_grad_()
    (expected,) = torch.autograd.grad((alone / 0.8).log_softmax(-1).sum(), alone)
    torch.testing.assert_close(gradient[kept], expected)
    assert gradient[~kept].eq(0).all()


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}],
    ids=str,
)
def test_a_setting_out_of_range_is_named(setting):
    (name,) = setting
    with pytest.raises(UserError, match=name):
        Decoding(**setting)
    with pytest.raises(UserError, match=name):
        filtered_log_softmax(torch.zeros(3), **setting)


def numbers(rows: int, seed: int = 0) -> torch.Tensor:
    return uniform(seed, "draw", rows * NUMBERS_PER_TOKEN).unflatten(0, (rows, NUMBERS_PER_TOKEN))


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 16, 37])
def test_tokens_are_drawn_as_often_as_they_are_probable(vocabulary):
    rows = 20_000
    log_probability = filtered_log_softmax(torch.randn(vocabulary), top_k=min(vocabulary, 20))
    drawn = draw(log_probability.expand(rows, -1), numbers(rows)).bincount(minlength=vocabulary)
    expected = rows * log_probability.exp()
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    chi_square = ((drawn - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square <= degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-24])
def test_the_smallest_and_the_largest_number_draw_tokens_of_positive_probability(number):
    log_probability = torch.randn(64, 5000).log_softmax(-1)
    log_probability[torch.rand(64, 5000) < 0.9] = -torch.inf  # the mass that is left is below 1
    drawn = draw(log_probability, torch.full((64, NUMBERS_PER_TOKEN), number))
    assert log_probability.gather(-1, drawn[:, None]).isfinite().all()


def test_logits_that_differ_by_rounding_rarely_draw_another_token():
    rows, vocabulary = 1000, 8192
    logits = 2 * torch.randn(vocabulary)
    first, second = (values.log_softmax(-1) for values in (logits, logits + 1e-2 * torch.randn(vocabulary)))
    distance = 0.5 * (first.exp() - second.exp()).abs().sum()
    uniforms = numbers(rows)
    drawn = [draw(values.expand(rows, -1), uniforms) for values in (first, second)]
    one_number = [torch.searchsorted(values.double().exp().cumsum(-1), uniforms[:, 0].double()) for values in (first, second)]
    changed, changed_by_one_number = ((a != b).float().mean() for a, b in (drawn, one_number))
    assert 0 < changed < 6 * distance
    assert changed_by_one_number > 20 * changed
