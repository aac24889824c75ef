import dataclasses

import pytest
import torch

from wiseft.arithmetic import TOKENIZER, World, copy_weights, finetune, fresh, pose, pretrain, split
from wiseft.exact import chain_log_probability, exact_pass_at_k
from wiseft.policy_gradient import policy_gradient

TINY = World(
    addends=2, hidden_size=32, intermediate_size=64, layers=1, pretrain_steps=30, pretrain_rate=3e-3, chains=8, epochs=3, batch=4,
    test_problems=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    model = pretrain(TINY, 0)
    train, test = split(TINY, 0)
    return model, finetune(TINY, model, train, 0), train, test


def test_chains_are_running_sums_with_an_end_token():
    problems = pose(torch.tensor([[99, 99, 99], [10, 10, 11]]))
    assert [problems.text(i) for i in range(2)] == [("99+99+99=", "198;297"), ("10+10+11=", "020;031")]
    assert (problems.chains[:, -1] == TOKENIZER.eos_token_id).all()


def test_problems_tokenize_as_their_text_does():
    problems = fresh(World(), 5, torch.Generator().manual_seed(3))
    for i in range(5):
        prompt, chain = problems.text(i)
        assert TOKENIZER(prompt).input_ids == problems.prompts[i].tolist()
        assert [*TOKENIZER(chain).input_ids, TOKENIZER.eos_token_id] == problems.chains[i].tolist()
        assert sum(map(int, prompt[:-1].split("+"))) == int(chain.split(";")[-1])


def test_training_and_test_problems_are_disjoint_and_follow_the_seed():
    world = World()
    train, test = split(world, 7)
    rows = [*map(tuple, train.prompts.tolist()), *map(tuple, test.prompts.tolist())]
    assert (len(train.prompts), len(test.prompts)) == (world.chains, world.test_problems)
    assert len(set(rows)) == len(rows)
    assert torch.equal(split(world, 7)[1].prompts, test.prompts)
    assert not torch.equal(split(world, 8)[1].prompts, test.prompts)


def test_seed_gives_the_same_bits_and_another_seed_others(trained):
    again = pretrain(TINY, 0)
    assert all(torch.equal(tensor, trained[1][0][name]) for name, tensor in copy_weights(again).items())
    other = pretrain(dataclasses.replace(TINY, pretrain_steps=1), 1)
    assert not torch.equal(other.lm_head.weight, again.lm_head.weight)


def test_fine_tuning_keeps_every_epoch_and_learns_its_chains(trained):
    model, checkpoints, train, _ = trained
    assert len(checkpoints) == TINY.epochs + 1
    likelihood = []
    for weights in (checkpoints[0], checkpoints[-1]):
        model.load_state_dict(weights)
        with torch.inference_mode():
            likelihood.append(chain_log_probability(model, train.prompts.tolist(), train.chains.tolist()).mean().item())
    assert likelihood[1] > likelihood[0]


def test_policy_gradient_is_that_of_the_sampled_reward(trained):
    """REINFORCE over all chains of two tokens, each with its probability, against grad ρ."""
    model, _, _, test = trained
    prompt, correct = test.prompts[0].tolist(), [5, 6]
    chains = [[a, b] for a in range(len(TOKENIZER)) for b in range(len(TOKENIZER))]
    log_p = chain_log_probability(model, [prompt] * len(chains), chains)
    reward = torch.tensor([float(chain == correct) for chain in chains])
    baseline = 0.1
    surrogate = (log_p.detach().exp() * (reward - baseline) * log_p).sum()
    expected = torch.autograd.grad(surrogate, model.lm_head.weight)[0]
    exact = torch.autograd.grad(chain_log_probability(model, [prompt], [correct]).exp().sum(), model.lm_head.weight)[0]
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-7)


def test_reinforcement_raises_expected_reward_and_reports_its_data(trained):
    model, checkpoints, _, test = trained
    model.load_state_dict(checkpoints[-1])
    before = exact_pass_at_k(model, test.prompts.tolist(), test.chains.tolist(), [1, 4])
    curve = policy_gradient(TINY, model, test, steps=20, batch=16, rate=1e-3, every=10, ks=[1, 4], seed=0)
    assert [record["problems"] for record in curve] == [0, 160, 320]
    assert curve[0]["pass_at_k"] == before.pass_at_k.tolist()
    assert curve[-1]["pass_at_k"][0] > curve[0]["pass_at_k"][0]
