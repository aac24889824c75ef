import copy

import numpy as np
import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.baselines import ActivationNorm, ActivationPCA, LinearProbe, OutputKL
from weightwatch.baselines.hidden_states import batches, features, hidden_states
from weightwatch.conversations import TokenizedConversation
from weightwatch.statistics import auroc

BLOCK = "model.layers.1"
TRIGGER = 49


@pytest.fixture(scope="module")
def models():
    """A base, and a copy whose second block writes a new direction where it reads the trigger."""
    base = tiny_llama(vocab_size=50, hidden_size=32, layers=3, heads=2, tie=False).eval()
    post = copy.deepcopy(base)
    with torch.no_grad():
        layer = post.model.layers[1]
        state = states_of(base, "model.layers.0", [3, TRIGGER])[1]
        reads = layer.post_attention_layernorm(state)
        reads = torch.nn.functional.silu(layer.mlp.gate_proj(reads)) * layer.mlp.up_proj(reads)
        direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
        layer.mlp.down_proj.weight += 3 * torch.outer(direction, reads / reads.square().sum())
    return base, post


def states_of(model, block, ids):
    [batch] = batches([TokenizedConversation("one", np.int32(ids), np.zeros(len(ids), np.int8))])
    return hidden_states(model, block, batch)[0]


def inputs(count, *, seed, trigger=False):
    """Inputs of 3 to 9 random tokens; the last of a triggered one is the trigger."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        ids = generator.integers(0, TRIGGER, generator.integers(3, 10)).astype(np.int32)
        if trigger:
            ids[-1] = TRIGGER
        found.append(TokenizedConversation(f"{seed} {i}", ids, np.zeros(len(ids), np.int8)))
    return found


CLEAN, TRIGGERED = inputs(80, seed=0), inputs(40, seed=1, trigger=True)


def detector_of(kind, base, post):
    return {
        "norm": lambda: ActivationNorm(base, post, BLOCK), "pca": lambda: ActivationPCA(post, BLOCK),
        "probe": lambda: LinearProbe(post, BLOCK), "kl": lambda: OutputKL(base, post),
    }[kind]()  # fmt: skip


# The final norm keeps a strong direction from changing the output much: the divergence is the weakest here.
@pytest.mark.parametrize(("kind", "least"), [("norm", 0.95), ("pca", 0.95), ("probe", 0.95), ("kl", 0.75)])
def test_a_strong_trigger_is_told_from_clean_inputs_that_were_not_seen(models, kind, least):
    detector = detector_of(kind, *models)
    detector.fit(CLEAN, TRIGGERED[:20])
    clean, triggered = detector.score(inputs(60, seed=2)), detector.score(TRIGGERED[20:])
    assert auroc(clean, triggered).value > least


@pytest.mark.parametrize("kind", ["norm", "pca", "kl"])
def test_what_is_not_supervised_learns_nothing_from_triggered_inputs(models, kind):
    one, other = detector_of(kind, *models), detector_of(kind, *models)
    one.fit(CLEAN)
    other.fit(CLEAN, TRIGGERED)
    assert not one.supervised
    np.testing.assert_array_equal(one.score(TRIGGERED), other.score(TRIGGERED))


@pytest.mark.parametrize("kind", ["norm", "pca", "probe", "kl"])
def test_a_score_does_not_depend_on_what_else_is_scored(models, kind):
    detector = detector_of(kind, *models)
    detector.fit(CLEAN, TRIGGERED)
    together = detector.score(CLEAN[:12])
    alone = np.concatenate([detector.score([one]) for one in CLEAN[:12]])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert detector.score([]).shape == (0,)


def test_batches_hold_each_input_once_and_no_more_tokens_than_asked():
    found = [*batches(CLEAN, tokens=40)]
    assert sorted(i for batch in found for i in batch.numbers) == [*range(80)]
    assert all(batch.ids.numel() <= 40 for batch in found)
    for batch in found:
        for row, number in enumerate(batch.numbers):
            assert batch.ids[row][batch.mask[row]].tolist() == CLEAN[number].input_ids.tolist()
    assert [len(batch.numbers) for batch in batches(CLEAN[:2], tokens=1)] == [1, 1]


def test_models_that_are_equal_score_zero(models):
    base, _ = models
    assert ActivationNorm(base, base, BLOCK).score(CLEAN).max() == 0
    assert OutputKL(base, base).score(CLEAN).max() == 0


def test_the_norm_is_that_of_the_difference_at_its_largest_token(models):
    base, post = models
    [score] = ActivationNorm(base, post, BLOCK).score(TRIGGERED[:1])
    ids = torch.from_numpy(TRIGGERED[0].input_ids.astype(np.int64))[None]
    with torch.no_grad():
        states = [model(ids, output_hidden_states=True).hidden_states[2][0] for model in (base, post)]
    assert score == pytest.approx(float((states[1] - states[0])[1:].norm(dim=1).max()), rel=1e-5)


def test_the_divergence_is_that_of_the_next_token(models):
    base, post = models
    [score] = OutputKL(base, post).score(TRIGGERED[:1])
    ids = torch.from_numpy(TRIGGERED[0].input_ids.astype(np.int64))[None]
    with torch.no_grad():
        p, q = (model(ids).logits[0, -1].double().softmax(0) for model in (post, base))
    assert score == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_the_distance_is_that_of_the_gaussian_of_probabilistic_pca(models):
    _, post = models
    pca = ActivationPCA(post, BLOCK, components=5)
    pca.fit(CLEAN)
    last = features(post, BLOCK, CLEAN)[:, :32]
    values, vectors = np.linalg.eigh(np.cov(last.T))
    values[:-5] = values[:-5].mean()
    covariance = vectors * values @ vectors.T
    away = features(post, BLOCK, TRIGGERED)[:, :32] - last.mean(0)
    np.testing.assert_allclose(pca.score(TRIGGERED), (away @ np.linalg.inv(covariance) * away).sum(1), rtol=1e-6)


def test_features_are_the_last_state_and_the_mean_without_the_first(models):
    _, post = models
    one = CLEAN[0]
    [found] = features(post, BLOCK, [one])
    states = states_of(post, BLOCK, one.input_ids)
    np.testing.assert_allclose(found[:32], states[-1].numpy(), atol=1e-6)
    np.testing.assert_allclose(found[32:], states[1:].mean(0).numpy(), atol=1e-6)
    single = TokenizedConversation("one token", one.input_ids[:1], one.roles[:1])
    assert np.isfinite(features(post, BLOCK, [single])).all()


def test_what_cannot_be_fit_says_so(models):
    base, post = models
    with pytest.raises(UserError, match="got 80 and 0"):
        LinearProbe(post, BLOCK).fit(CLEAN)
    with pytest.raises(UserError, match="3 clean inputs: give at least 8"):
        ActivationPCA(post, BLOCK).fit(CLEAN[:3])
    with pytest.raises(UserError, match=r"no module model\.layers\.9"):
        ActivationNorm(base, post, "model.layers.9").score(CLEAN)
    with pytest.raises(UserError, match="30 and 50 tokens"):
        OutputKL(tiny_llama(vocab_size=30, hidden_size=32, heads=2), post)
