"""linear_logprob against float64 autograd through the whole logits: values, gradients, memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmcore.ops.linear_logprob import linear_logprob, reference
from lmcore.ops.linear_logprob import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for a second one
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Each back end, with tiles so small that every loop over chunks, slabs and parts turns more than once."""
    vocabulary = request.node.callspec.params.get("v", 301)
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    monkeypatch.setattr(reference, "TILE", 40 * vocabulary)
    monkeypatch.setattr(kernels, "TILE", 50 * max(256, vocabulary // 2))
    monkeypatch.setattr(kernels, "TILE_TOKENS", 50)
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    return request.param


def problem(n, v, d, dtype=torch.float32, bias=True, scale=2.0, requires_grad=True):
    """Return hidden, weight, bias (logits of about `scale`), targets, and a weight for each log-probability and entropy."""
    hidden, weight, offset = torch.randn(n, d) * scale / d**0.5, torch.randn(v, d), torch.randn(v)
    inputs = [x.to(DEVICE, dtype).requires_grad_(requires_grad) for x in (hidden, weight, *([offset] if bias else []))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.randn(n, dtype=wide, device=DEVICE) for _ in range(2)]
    return *(inputs if bias else [*inputs, None]), torch.randint(v, (n,), device=DEVICE), upstream


def run(hidden, weight, bias, target, upstream, softcap=None):
    """Return the log-probabilities, the entropies and the gradients of their sum weighted by `upstream`."""
    logprob, entropy = linear_logprob(hidden, weight, target, bias, softcap, return_entropy=True)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    return [logprob, entropy, *torch.autograd.grad((logprob, entropy), inputs, upstream)]


def oracle(hidden, weight, bias, target, upstream, softcap, rounds_dz):
    """Return what `run` should, from float64 autograd through all logits, and how far off each number may be.

    A logit is a float32 sum of d products that are exact for half dtypes: off by at most d eps (|h|·|w| + |b|), and the softcap by
    eps softcap. Log-probabilities and entropies inherit that, entropies times the spread of log p. An error in z changes p, so each dz,
    by that share of its parts. Products add eps per term, a half dtype its unit roundoff once per result, and on a GPU once per dz.
    """
    dtype, n = hidden.dtype, len(hidden)
    hidden, weight, bias = (None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    z = hidden @ weight.T + (0 if bias is None else bias)
    z.retain_grad()
    log_p = torch.log_softmax(z if softcap is None else softcap * torch.tanh(z / softcap), 1)
    logprob, entropy = log_p[torch.arange(n), target], -(log_p.exp() * log_p).sum(1)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    *grads, dz = torch.autograd.grad((logprob, entropy), [*inputs, z], [x.double() for x in upstream])

    eps = torch.finfo(reference.wide(torch.empty(0, dtype=dtype))).eps
    unit = torch.finfo(dtype).eps / 2 if dtype in HALF else 0.0
    with torch.no_grad():
        g, k = (x.double().abs()[:, None] for x in upstream)
        size = (hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())).max() + (softcap or 0)
        error = (hidden.shape[1] + 8) * eps * size
        spread = (log_p + entropy[:, None]).abs()
        parts = log_p.exp() * (g + k * (spread + 1))
        parts.scatter_add_(1, target[:, None], g)
        off = (4 * error + (n + 8) * eps) * parts
        if rounds_dz:
            off += unit * dz.abs() + torch.finfo(dtype).smallest_normal * unit
        shares = (off @ weight.abs(), off.T @ hidden.abs(), off.sum(0))
        allowed = [share + unit * grad.abs() + eps * grad.abs() for share, grad in zip(shares, grads, strict=False)]
    return [logprob, entropy, *grads], [2 * error, 4 * error * (1 + spread.max()), *allowed]


def assert_within(got, expected, allowed):
    for name, x, y, off in zip(("logprob", "entropy", "hidden", "weight", "bias"), got, expected, allowed, strict=False):
        excess = ((x.double() - y).abs() - off).max()
        assert excess <= 0, f"{name} is beyond its error bound by {excess:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (1, 63, 7), (130, 301, 65)])
def test_values_and_gradients_match_float64(backend, n, v, d, dtype):
    inputs = problem(n, v, d, dtype)
    assert_within(run(*inputs), *oracle(*inputs, None, rounds_dz=backend == "triton"))


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("v", [5001])
def test_softcap_follows_the_bias(backend, v, dtype, bias):
    inputs = problem(63, v, 33, dtype, bias, scale=6.0)
    assert_within(run(*inputs, softcap=5.0), *oracle(*inputs, 5.0, rounds_dz=backend == "triton"))


@pytest.mark.parametrize("part", [0, 1], ids=["logprob", "entropy"])
def test_each_result_is_differentiable_alone(backend, part):
    *inputs, target, upstream = problem(63, 301, 33)
    results = linear_logprob(*inputs[:2], target, inputs[2], return_entropy=True)
    got = torch.autograd.grad(results[part], inputs, upstream[part])
    upstream[1 - part].zero_()
    expected, allowed = oracle(*inputs, target, upstream, None, rounds_dz=False)
    assert_within([x.detach() for x in results] + list(got), expected, allowed)
    alone = linear_logprob(*inputs[:2], target, inputs[2])
    assert torch.equal(alone, results[0])


def test_results_have_their_sign_even_where_the_distribution_is_a_point(backend):
    hidden, weight, bias, target, _ = problem(63, 301, 33, scale=300.0)
    logprob, entropy = linear_logprob(hidden, weight, target, bias, return_entropy=True)
    assert logprob.max() <= 0
    assert entropy.min() >= 0
    assert (entropy < 1e-6).any()


def test_the_only_word_has_probability_one_exactly(backend):
    logprob, entropy, *_ = run(*problem(63, 1, 33))
    assert not logprob.any()
    assert not entropy.any()


def test_strided_inputs_give_what_contiguous_ones_give(backend):
    hidden, weight, bias, target, upstream = problem(63, 301, 33, requires_grad=False)
    expected = run(*(x.requires_grad_() for x in (hidden, weight, bias)), target, [upstream[0][:1].expand(63), upstream[1]])
    strided = (hidden.detach().T.contiguous().T, weight.detach().T.contiguous().T, bias.detach().repeat_interleave(2)[::2])
    strided = (*(x.requires_grad_() for x in strided), target.repeat_interleave(3)[::3])
    assert not any(x.is_contiguous() for x in strided)
    got = run(*strided, [upstream[0][:1].expand(63), upstream[1].repeat_interleave(2)[::2]])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_no_tokens_give_no_results_and_zero_gradients(backend):
    logprob, entropy, *grads = run(*problem(0, 301, 33))
    assert logprob.shape == entropy.shape == (0,)
    assert [tuple(x.shape) for x in grads] == [(0, 33), (301, 33), (301,)]
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_passes_and_a_second_derivative_is_refused(monkeypatch, softcap):
    monkeypatch.setattr(reference, "TILE", 11 * 2)
    hidden, weight, bias, target, _ = problem(5, 11, 3, torch.float64)
    both = lambda *inputs: linear_logprob(*inputs[:2], target, inputs[2], softcap, return_entropy=True)  # noqa: E731
    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    (grad,) = torch.autograd.grad(both(hidden, weight, bias)[0].sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_the_gradients_that_are_needed_are_computed(backend, needs):
    *inputs, target, upstream = problem(63, 301, 33)
    expected = run(*inputs, target, upstream)[2:]
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    with Operations() as all_seen:
        module = {"reference": reference, "triton": kernels}[backend]
        detached = [x.detach() for x in inputs]
        _, logsumexp, entropy = module.forward(*detached[:2], target, detached[2], None, True)
        all_seen.clear()
        module.backward(*upstream, [*detached[:2], target, detached[2], logsumexp, entropy], None, list(needs))
    products = [seen for seen in all_seen if seen[0] in ("mm", "addmm_")]
    chunks = 2 if backend == "reference" else 2 * 2  # and the reference recomputes its logits by a product too
    assert len(products) == chunks * (sum(needs[:2]) + (backend == "reference"))
    loss = linear_logprob(*inputs[:2], target, inputs[2], return_entropy=True)
    torch.autograd.backward(loss, upstream)
    for x, need, grad in zip(inputs, needs, expected, strict=True):
        assert torch.equal(x.grad, grad) if need else x.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden is torch.float32 \(2, 3, 4\): expected a float matrix"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"weight": torch.zeros(5, 3)}, r"weight is torch.float32 \(5, 3\) on cpu: expected torch.float32 \(5, 4\)"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "weight is torch.bfloat16 .* expected torch.float32"),
        ({"weight": torch.zeros(5)}, r"weight is torch.float32 \(5,\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target is torch.int64 \(2,\) on cpu: expected torch.int64 \(3,\)"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "target is torch.int32"),
        ({"target": torch.tensor([0, 5, 1])}, r"target holds 5: expected values in \[0, 5\)"),
        ({"target": torch.tensor([0, 1, -100])}, "target holds -100"),
        ({"bias": torch.zeros(4)}, r"bias is torch.float32 \(4,\) on cpu: expected torch.float32 \(5,\)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    fitting = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**fitting, **change})


def test_a_target_that_the_kernel_does_not_find_gives_nan():
    hidden, weight, bias, _, _ = problem(4, 130, 8, requires_grad=False)
    target = torch.tensor([0, 129, 130, -100], device=DEVICE)
    logprob = kernels.forward(hidden, weight, target, bias, None, False)[0]
    assert logprob.isnan().tolist() == [False, False, True, True]


class Operations(TorchDispatchMode, list):
    """Records (operator, bytes of the largest tensor made) for each operator that runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.append((func.overloadpacket.__name__, max(storages, default=0)))
        return result


@pytest.mark.parametrize(("module", "n", "v", "tile"), [(reference, 2048, 32000, 2**22), (kernels, 128, 2000, 2**14)])
def test_no_tensor_is_larger_than_a_tile_or_an_operand(module, n, v, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    hidden, weight, bias, target, upstream = problem(n, v, 8, requires_grad=False)
    with Operations() as seen:
        _, logsumexp, entropy = module.forward(hidden, weight, target, bias, None, True)
        module.backward(*upstream, [hidden, weight, target, bias, logsumexp, entropy], None, [True] * 3)
    largest = max(size for _, size in seen)
    assert largest <= max(tile * 4, hidden.nbytes, weight.nbytes)
    assert largest < n * v * 4 / 10


MEMORY = """
import resource, torch
from lmcore.ops.linear_logprob import linear_logprob

def step(n):
    logprob, entropy = linear_logprob(hidden[:n], weight, target[:n], return_entropy=True)
    (logprob.sum() + entropy.sum()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
hidden, weight = torch.randn(2048, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
target = torch.randint(32000, (2048,))
print(step(1), step(2048))
"""


def test_a_process_grows_by_six_tiles_at_most():
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # freed tiles go back at once: the peak is what lives together
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    before, after = (int(kibibytes) * 1024 for kibibytes in run.stdout.split())
    assert after - before < 6 * reference.TILE * 4 < 2048 * 32000 * 4 / 2  # half of one tensor of logits


def test_a_llama_has_the_log_probabilities_of_its_own_logits():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 301, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    tokens = torch.randint(301, (2, 20))
    expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).flatten()
    hidden = model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    got = linear_logprob(hidden, model.lm_head.weight, tokens[:, 1:].flatten())
    torch.testing.assert_close(got, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, x, y in zip(names, *(torch.autograd.grad(loss.sum(), parameters) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_a_compiler_takes_it_without_a_graph_break():
    *inputs, target, upstream = problem(63, 301, 33)
    twice = lambda hidden, *rest: linear_logprob(hidden * 2, rest[0], target, rest[1]) * 3  # noqa: E731
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    got, expected = (torch.autograd.grad(f(*inputs), inputs, upstream[0]) for f in (compiled, twice))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
