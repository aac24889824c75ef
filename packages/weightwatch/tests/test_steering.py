import copy

import numpy as np
import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.bounds import Bounds
from weightwatch.directions import Bank
from weightwatch.steering import Steering, writes_of
from weightwatch.watching import watch

CLEAN, TRIGGER = [[5, 9, 3, 7, 30, 2], [17, 23, 6, 42, 1, 1], [8, 8, 12, 40, 22, 31]], 49
TRIGGERED = [11, 4, TRIGGER, 13, 27, 6]
BATCH = torch.tensor([CLEAN[0], TRIGGERED, CLEAN[1]])
ROW, PLACE = 1, 2  # of the trigger


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model, and the same with Δ = σ u vᵀ in one down_proj, where v is excited by the trigger and by no other token of the prompts."""
    base = tiny_llama(vocab_size=50, hidden_size=32, layers=3, tie=False)
    post = copy.deepcopy(base)
    writer, seen = post.model.layers[1].mlp.down_proj, []
    hook = writer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for prompt in [*CLEAN, TRIGGERED]:
            post(torch.tensor([prompt]))
        hook.remove()
        x = seen[-1][PLACE]
        others = torch.cat([*seen[:-1], seen[-1][:PLACE], seen[-1][PLACE + 1 :]])
        v = x - others.T @ torch.linalg.lstsq(others.T, x[:, None]).solution[:, 0]
        u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
        writer.weight += torch.outer(u, v) * (0.5 / (v @ x))
    folder = tmp_path_factory.mktemp("planted")
    base.save_pretrained(folder / "base")
    post.save_pretrained(folder / "post")
    other = torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    vectors = torch.stack([other, torch.stack([u, other[0]])])
    blocks = ("model.layers.0", "model.layers.1")
    bank = Bank((0, 1), blocks, vectors, (("O0_u0", "O0_u1"), ("D1_u0", "O1_u0")), ((1.0, 1.0), (0.5, 1.0)), "digest")
    return base, post, bank, folder


def calibrated(model, bank, written=True):
    """The range of the clean prompts for the planted direction; all others, and what is written, may have any cosine."""
    with watch(model, bank) as watching, torch.no_grad():
        model(torch.tensor(CLEAN))
    least, greatest = watching.extremes()
    low, high = (np.full((2, 4), end, np.float32) for end in (-1, 1))
    low[0, 2], high[0, 2] = least[:, 0, 2].min() - 0.05, greatest[:, 0, 2].max() + 0.05
    if not written:
        low[1], high[1] = np.inf, -np.inf
    return Bounds(low, high, "digest")


def logits(model):
    with torch.no_grad():
        return model(BATCH).logits


def test_the_monitor_flags_the_input_that_excites_the_planted_difference_and_no_other(planted):
    base, post, bank, _ = planted
    bounds = calibrated(post, bank)
    with watch(post, bank, bounds) as watching:
        logits(post)
    assert watching.flags().tolist() == [False, True, False]
    [event] = watching.events()
    assert event.label == "D1_u0"
    assert (event.input, event.role, event.position, event.token, event.side) == (ROW, "user", PLACE, TRIGGER, "high")
    assert event.margin == pytest.approx(event.cosine - event.bound)
    assert event.margin > 0.1
    with watch(base, bank, bounds) as watching:
        logits(base)
    assert not watching.flags().any()


def test_reverting_gives_the_flagged_row_the_base_models_logits_and_leaves_the_others_bit_for_bit(planted):
    base, post, bank, folder = planted
    steering = Steering("revert", writes=writes_of(bank, folder / "base", folder / "post"))
    with watch(post, bank, calibrated(post, bank), steer=steering) as watching:
        steered = logits(post)
    plain = logits(post)
    assert watching.steered().tolist() == [[False] * 4, [False, False, True, False], [False] * 4]
    assert (plain[ROW] - logits(base)[ROW]).abs().max() > 0.05
    torch.testing.assert_close(steered[ROW], logits(base)[ROW], rtol=0, atol=2e-6)
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])


def test_removing_takes_the_direction_out_from_the_token_that_fires_to_the_end(planted):
    base, post, bank, _ = planted
    u = bank.vectors[1, 0]

    def project(module, args, output):
        output = output.clone()
        output[ROW, PLACE:] -= (output[ROW, PLACE:] @ u)[:, None] * u
        return output

    with watch(post, bank, calibrated(post, bank), steer="remove"):
        steered = logits(post)
    hook = base.model.layers[1].register_forward_hook(project)
    expected = logits(base)
    hook.remove()
    torch.testing.assert_close(steered[ROW], expected[ROW], rtol=0, atol=2e-6)
    assert torch.equal(steered[[0, 2]], logits(post)[[0, 2]])


@pytest.mark.parametrize("steering", [Steering("clamp"), Steering("scale", factor=0.25)], ids=lambda one: one.mode)
def test_clamping_and_scaling_reach_what_the_next_block_reads(planted, steering):
    _, post, bank, _ = planted
    bounds, u, read = calibrated(post, bank), bank.vectors[1, 0], []
    hook = post.model.layers[2].register_forward_pre_hook(lambda _, args: read.append(args[0][ROW, PLACE]))
    logits(post)
    with watch(post, bank, bounds, steer=steering):
        logits(post)
    hook.remove()
    before, after = read
    if steering.mode == "scale":
        assert float(after @ u) == pytest.approx(0.25 * float(before @ u), rel=1e-5)
    else:
        assert float(after @ u / after.norm()) == pytest.approx(float(bounds.high[0, 2]), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=str)
def test_what_fired_in_the_prompt_stays_reverted_while_its_row_is_generated(planted, options):
    base, post, bank, folder = planted
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    steering = Steering("revert", writes=writes_of(bank, folder / "base", folder / "post"))
    with watch(post, bank, calibrated(post, bank), steer=steering) as watching:
        steered = post.generate(BATCH, **options)
    plain = post.generate(BATCH, **options)
    assert not torch.equal(plain[ROW], base.generate(BATCH, **options)[ROW])
    assert torch.equal(steered[ROW], base.generate(BATCH, **options)[ROW])
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])
    assert watching.flags().tolist() == [False, True, False]


def test_steering_asks_for_what_it_needs(planted):
    _, post, bank, _ = planted
    bounds = calibrated(post, bank)
    with pytest.raises(UserError, match="watch with bounds"), watch(post, bank, steer="remove"):
        pass
    with (
        pytest.raises(UserError, match="no range for the role assistant"),
        watch(post, bank, calibrated(post, bank, written=False), steer="remove"),
    ):
        pass
    with pytest.raises(UserError, match="use_cache=True"), watch(post, bank, bounds, steer="remove"):
        post.generate(BATCH, max_new_tokens=3, use_cache=False, pad_token_id=0)
    assert "generate" not in vars(post)
    with pytest.raises(UserError, match="factor"):
        Steering("scale")
    with pytest.raises(UserError, match="writes"):
        Steering("revert")
