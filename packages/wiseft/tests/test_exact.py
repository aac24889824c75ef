import itertools

import numpy as np
import pytest
import torch

from lmcore.models import tiny_llama
from wiseft.decoding import filtered_log_softmax
from wiseft.exact import chain_log_probability, exact_pass_at_k, pass_at_k_of

PROMPTS = [[1, 2, 3], [2], [3, 0, 1, 2, 1]]
CHAINS = [[0, 3], [1, 1, 2], [2]]


@pytest.fixture(scope="module")
def model():
    made = tiny_llama(vocab_size=4, hidden_size=32)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4)  # an untrained model is nearly uniform: make its distribution worth testing
    return made


@pytest.mark.parametrize(
    "decoding", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 1.5}]
)
def test_equals_a_product_of_next_token_probabilities(model, decoding):
    for prompt, chain, found in zip(
        PROMPTS, CHAINS, exact_pass_at_k(model, PROMPTS, CHAINS, 1, **decoding).success, strict=True
    ):
        expected, so_far = 1.0, list(prompt)
        for token in chain:
            with torch.inference_mode():
                logits = model(torch.tensor([so_far])).logits[0, -1].double()
            expected *= filtered_log_softmax(logits, **decoding).exp()[token].item()
            so_far.append(token)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-300)


def test_probabilities_of_all_chains_sum_to_one(model):
    chains = list(itertools.product(range(4), repeat=3))
    found = exact_pass_at_k(model, [PROMPTS[0]] * len(chains), chains, 1, temperature=1.3)
    assert found.success.sum() == pytest.approx(1, abs=1e-6)


def test_agrees_with_brute_force_sampling(model):
    torch.manual_seed(1)
    samples, k, temperature = 20_000, 4, 1.3
    rows = torch.tensor([PROMPTS[0]] * samples)
    for _ in CHAINS[0]:
        with torch.inference_mode():
            logits = model(rows).logits[:, -1]
        rows = torch.cat([rows, (logits / temperature).softmax(-1).multinomial(1)], 1)
    correct = (rows[:, len(PROMPTS[0]) :] == torch.tensor(CHAINS[0])).all(1)
    passed = correct.view(-1, k).any(1).double()
    exact = exact_pass_at_k(model, PROMPTS[:1], CHAINS[:1], [1, k], temperature=temperature)
    for drawn, expected in [(correct.double(), exact.pass_at_k[0]), (passed, exact.pass_at_k[1])]:
        assert abs(drawn.mean().item() - expected) < 4 * drawn.std().item() / len(drawn) ** 0.5


def test_batch_size_and_padding_do_not_matter(model):
    together = exact_pass_at_k(model, PROMPTS, CHAINS, [1, 8])
    apart = exact_pass_at_k(model, PROMPTS, CHAINS, [1, 8], batch_size=1)
    np.testing.assert_allclose(together.log_success, apart.log_success, rtol=1e-5)


def test_pass_at_2_is_one_minus_squared_bias_minus_variance(model):
    found = exact_pass_at_k(model, PROMPTS, CHAINS, [2])
    assert found.pass_at_k[0] == pytest.approx(1 - found.bias**2 - found.variance, abs=1e-14)


def test_filtered_out_token_makes_success_zero(model):
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([[1]])).logits[0, -1].argmax())
    found = exact_pass_at_k(model, [[1], [1]], [[likeliest], [(likeliest + 1) % 4]], [1, 64], temperature=0.0)
    assert found.success.tolist() == [1.0, 0.0]
    assert found.pass_at_k.tolist() == [0.5, 0.5]


def test_pass_at_k_keeps_relative_precision_at_both_ends():
    tiny, almost = -80.0, -1e-30
    assert pass_at_k_of(np.array([tiny]), [1000])[0] == pytest.approx(1000 * np.exp(tiny), rel=1e-12)
    assert pass_at_k_of(np.array([almost, 0.0]), [1, 3]).tolist() == [1.0, 1.0]


def test_gradient_of_the_log_probability_reaches_the_weights(model):
    chain_log_probability(model, PROMPTS, CHAINS).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_empty_chain_and_unequal_numbers_are_named(model):
    with pytest.raises(ValueError, match="problem 1 has 1 prompt tokens and 0 chain tokens"):
        exact_pass_at_k(model, [[1], [2]], [[1], []], 1)
    with pytest.raises(ValueError, match="zip"):
        exact_pass_at_k(model, [[1], [2]], [[1]], 1)
    with pytest.raises(ValueError, match="k = 0"):
        exact_pass_at_k(model, [[1]], [[1]], 0)
