"""SiftAdam keeps the signs, goes on from where it stopped, and runs inside the Trainer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from siftmasks.optimizer import SiftAdam
from siftmasks.signs import sign_vector

TOKENS = torch.randint(0, 31, (16, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def layer(dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(7, 5, bias=False).to(dtype)


def steps(module: nn.Module, optimizer: SiftAdam, count: int, start: int = 0) -> None:
    for step in range(start, start + count):
        torch.manual_seed(100 + step)
        weight = next(module.parameters())
        weight.grad = torch.randn(weight.shape).to(weight.dtype)
        optimizer.step()


def agrees(task_vector, seed: int, name: str) -> bool:
    return bool((task_vector * sign_vector(seed, name, task_vector.shape) >= 0).all())


def test_three_steps_are_those_of_a_float64_oracle():
    module, rate, gradient = layer(), 0.02, np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    optimizer, base = SiftAdam(module.named_parameters(), lr=rate, seed=3), module.weight.detach().numpy().astype(np.float64)
    v = sign_vector(3, "weight", (5, 7)).numpy()
    τ, m, s = np.zeros((3, 5, 7))
    clipped = 0
    for t in (1, 2, 3):
        g = gradient[t - 1].astype(np.float64)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        τ = τ - rate * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
        clipped += int((τ * v < 0).sum())
        τ[τ * v <= 0] = 0
        module.weight.grad = torch.from_numpy(gradient[t - 1])
        optimizer.step()
        found = optimizer.task_vectors()["weight"].numpy()
        np.testing.assert_allclose(found, τ, atol=1e-7)
        np.testing.assert_array_equal(found == 0, τ == 0)
        np.testing.assert_allclose(module.weight.detach().numpy(), base + τ, atol=2e-7)
    assert clipped > 10


def test_without_projection_it_is_the_adam_of_torch():
    module, other = layer(), layer()
    ours, theirs = SiftAdam(module.named_parameters(), lr=0.01, project=False), torch.optim.Adam(other.parameters(), lr=0.01)
    steps(module, ours, 5)
    steps(other, theirs, 5)
    torch.testing.assert_close(module.weight, other.weight, rtol=0, atol=1e-6)
    assert not agrees(ours.task_vectors()["weight"], 0, "weight")


def test_parameters_without_a_gradient_are_left_alone():
    model = nn.Sequential(layer(), nn.Linear(5, 5))
    before = model[1].weight.clone()
    optimizer = SiftAdam(model.named_parameters(), lr=0.1)
    steps(model, optimizer, 2)
    assert torch.equal(model[1].weight, before)
    assert optimizer.task_vectors().keys() == {"0.weight"}


def test_groups_have_their_own_rates():
    model = nn.Sequential(layer(), layer())
    groups = [{"params": [("a", model[0].weight)], "lr": 0.1}, {"params": [("b", model[1].weight)]}]
    optimizer = SiftAdam(groups, lr=0.01, project=False)
    model[0].weight.grad = model[1].weight.grad = torch.ones(5, 7)
    optimizer.step()
    moved = optimizer.task_vectors()
    torch.testing.assert_close(moved["a"], torch.full((5, 7), -0.1))
    torch.testing.assert_close(moved["b"], torch.full((5, 7), -0.01))


def test_a_nan_gradient_makes_its_weight_nan_and_no_other():
    module = layer()
    optimizer = SiftAdam(module.named_parameters(), lr=0.1)
    module.weight.grad = torch.ones(5, 7)
    module.weight.grad[1, 2] = torch.nan
    optimizer.step()
    steps(module, optimizer, 1)
    assert module.weight.isnan().nonzero().tolist() == [[1, 2]]


def test_small_steps_add_up_although_the_weight_is_bfloat16():
    module = layer(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = SiftAdam(module.named_parameters(), lr=1e-3, project=False)
    for _ in range(20):
        module.weight.grad = -torch.ones(5, 7, dtype=torch.bfloat16)
        optimizer.step()
    assert (module.weight == 1.0234375).all(), "1.02 rounded once; 1 + 0.001 is 1 in bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_optimizer_goes_on_with_the_same_bits(dtype):
    module = layer(dtype)
    optimizer = SiftAdam(module.named_parameters(), lr=0.01, seed=5)
    steps(module, optimizer, 3)
    weight, saved = module.weight.detach().clone(), optimizer.state_dict()
    other = layer(dtype, seed=9)
    resumed = SiftAdam(other.named_parameters(), lr=0.5)
    with torch.no_grad():
        other.weight.copy_(weight)
    resumed.load_state_dict(saved)
    steps(other, resumed, 3, start=3)
    steps(module, optimizer, 3, start=3)
    assert torch.equal(module.weight, other.weight)
    mine, theirs = optimizer.state[module.weight], resumed.state[other.weight]
    assert theirs["task_vector"].dtype == torch.float32
    assert all(torch.equal(torch.as_tensor(mine[entry]), torch.as_tensor(theirs[entry])) for entry in mine)
    assert agrees(theirs["task_vector"], 5, "weight"), "the seed is part of the saved state"


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"pass model\.named_parameters\(\)"):
        SiftAdam(layer().parameters())
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SiftAdam(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="weight has a sparse gradient"):
        optimizer.step()
    saved = SiftAdam([("mine", layer().weight)]).state_dict()
    with pytest.raises(UserError, match="mine is in one of them only"):
        SiftAdam([("yours", layer().weight)]).load_state_dict(saved)


def test_a_sharded_parameter_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module = layer()
        fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        optimizer = SiftAdam(module.named_parameters())
        module(torch.ones(1, 7)).sum().backward()
        with pytest.raises(UserError, match="weight is sharded"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def train(folder, dtype=torch.float32, resume=None):
    model = tiny_llama(vocab_size=31, hidden_size=32, dtype=dtype)
    model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = SiftAdam(model.named_parameters(), lr=1e-3, seed=2)
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trainer_gives_sign_consistent_task_vectors_and_resumes_with_the_same_bits(tmp_path, dtype):
    base = tiny_llama(vocab_size=31, hidden_size=32, dtype=dtype).state_dict()
    model, optimizer = train(tmp_path / "whole", dtype)
    vectors, weights = optimizer.task_vectors(), model.state_dict()
    assert vectors.keys() == {name for name, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    for name, task_vector in vectors.items():
        assert agrees(task_vector, 2, name)
        assert 0.3 < task_vector.count_nonzero() / task_vector.numel() < 0.9
        assert torch.equal(weights[name], (base[name].float() + task_vector).to(dtype))
    resumed, _ = train(tmp_path / "again", dtype, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.state_dict().items())
