"""Products with a weight difference: right in exact arithmetic, in both orientations, however the weights lie in memory."""

import pytest
import torch

from weightwatch.ops.delta_gemm import delta_gemm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch):
    """Runs a test once on each back end; returns the device of its tensors."""
    monkeypatch.setenv("LMCORE_BACKEND", request.param)
    return DEVICE if request.param == "triton" else "cpu"


def weights(rows, columns, q, dtypes=(torch.bfloat16, torch.bfloat16), transpose=False, device="cpu"):
    """Return base, a light fine-tune of it and the right side; half of the weights have not changed at all."""
    generator = torch.Generator().manual_seed(rows + 2 * columns)
    base = torch.randn(rows, columns, generator=generator) * 0.02
    changed = torch.rand(rows, columns, generator=generator) < 0.5
    post = base + torch.randn(rows, columns, generator=generator) * 1e-3 * changed
    right = torch.randn(rows if transpose else columns, q, generator=generator)
    return base.to(dtypes[0]).to(device), post.to(dtypes[1]).to(device), right.to(device)


def check(base, post, right, transpose):
    """Compare with float64: a rounding of each difference, one of each product, and one per term of the sum."""
    found = delta_gemm(base, post, right, transpose=transpose)
    delta = post.cpu().double() - base.cpu().double()
    delta, right = delta.T if transpose else delta, right.cpu().double()
    assert (found.shape, found.dtype) == ((len(delta), right.shape[1]), torch.float32)
    error = (found.cpu().double() - delta @ right).abs()
    assert (error <= (delta.shape[1] + 2) * 2.0**-24 * (delta.abs() @ right.abs())).all()


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("post", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "q"), [(1, 1, 1), (63, 65, 5), (33, 200, 70)])
def test_products_are_those_of_exact_arithmetic(rows, columns, q, base, post, transpose, device):
    check(*weights(rows, columns, q, (base, post), transpose, device), transpose)


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
def test_matrices_of_many_tiles(transpose, monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "reference")
    check(*weights(5001, 577, 28, transpose=transpose), transpose)


def test_a_row_may_be_longer_than_a_tile(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "reference")
    monkeypatch.setattr("weightwatch.ops.delta_gemm.reference.TILE", 16)
    for transpose in (False, True):
        check(*weights(7, 63, 3, transpose=transpose), transpose)


def test_the_inner_side_is_split_among_programs_and_the_sum_is_the_same_each_time(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "triton")
    tensors = weights(5, 1000, 3, device=DEVICE)
    check(*tensors, False)
    assert torch.equal(delta_gemm(*tensors), delta_gemm(*tensors))


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
def test_inputs_may_have_any_strides_and_stay_as_they_are(transpose, device):
    """Conv1D layers keep their weights the other way round; a fused tensor holds several matrices side by side."""
    base, post, right = weights(40, 48, 6, (torch.float32, torch.float32), transpose, device)
    expected = delta_gemm(base, post, right, transpose=transpose)
    fused = torch.zeros(40, 3, 48, device=device)
    fused[:, 1] = post
    for before in (base, base.T.contiguous().T, torch.nn.Parameter(base.clone())):
        for after in (post, post.T.contiguous().T, fused[:, 1]):
            found = delta_gemm(before, after, right.T.contiguous().T, transpose=transpose)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert torch.equal(before.detach(), base)
            assert torch.equal(after, post)


def test_weights_may_be_mapped_from_files(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, post, right = weights(200, 300, 9)
    for name, tensor in (("base", base), ("post", post)):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    with safe_open(tmp_path / "base.safetensors", "pt") as before, safe_open(tmp_path / "post.safetensors", "pt") as after:
        mapped = delta_gemm(before.get_tensor("w"), after.get_tensor("w"), right)
    assert torch.equal(mapped, delta_gemm(base, post, right))


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("rows", "columns", "q"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_tensors(rows, columns, q, transpose, device):
    found = delta_gemm(*weights(rows, columns, q, transpose=transpose, device=device), transpose=transpose)
    assert found.shape == (columns if transpose else rows, q)
    assert not found.any()


def test_equal_weights_give_zero_and_what_is_not_finite_shows(device):
    base, _, right = weights(40, 50, 4, device=device)
    assert not delta_gemm(base, base, right).any()
    post = base.clone()
    post[7, 3] = float("nan")
    found = delta_gemm(base, post, right)
    assert found[7].isnan().all()
    assert not found[torch.arange(40) != 7].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"post": torch.zeros(4)}, r"post is torch.float32 \(4,\), right \(5, 2\): expected"),
        ({"post": torch.zeros(4, 5, dtype=torch.float64)}, r"post is torch.float64 \(4, 5\)"),
        ({"base": torch.zeros(5, 4)}, r"base is torch.float32 \(5, 4\) on cpu: expected .* \(4, 5\) on cpu"),
        ({"base": torch.zeros(4, 5, dtype=torch.int8)}, r"base is torch.int8 \(4, 5\)"),
        ({"right": torch.zeros(4, 2)}, r"right is torch.float32 \(4, 2\) on cpu: expected torch.float32 \(5, 2\)"),
        ({"right": torch.zeros(5, 2).bfloat16()}, r"right is torch.bfloat16 \(5, 2\)"),
        ({"transpose": True}, r"right is torch.float32 \(5, 2\) on cpu: expected torch.float32 \(4, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"base": torch.zeros(4, 5), "post": torch.zeros(4, 5), "right": torch.zeros(5, 2)} | changed
    with pytest.raises(ValueError, match=message):
        delta_gemm(**given)
