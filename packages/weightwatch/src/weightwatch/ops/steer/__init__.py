"""Directions that leave their range are taken out of the hidden states: from the token that fires them to the end of its sequence."""

import math

import torch
from torch import Tensor

from lmcore.dispatch import pick
from weightwatch.ops.arguments import FLOATS, expect, expect_below

MODES = ("remove", "clamp", "scale", "revert")


def steer(
    hidden: Tensor,
    directions: Tensor,
    low: Tensor,
    high: Tensor,
    role: Tensor,
    sequence: Tensor,
    fired: Tensor,
    *,
    mode: str = "remove",
    scale: float | None = None,
    write: Tensor | None = None,
    gram: Tensor | None = None,
) -> Tensor:
    """Return hidden states in which the directions that have fired are steered, and note in `fired` which have.

    Direction j fires at row t of role r >= 0 if `c_tj = u_j·h_t / |h_t|` is not in [low_rj, high_rj]. S_t are the directions that had fired
    in the sequence of row t before the call, or fire at one of its rows up to t, itself included: steering is causal and sticky. Rows
    of a sequence stand in the order of time, with rows of others between them or not; a call for all its rows, several for parts of
    them, or one for each row give the same. Rows of role -1 (padding, the first tokens) never fire but are steered as their sequence is.

        h'_t = h_t + Uᵀ x,   U the rows u_j, j in S_t,   with x such that for all j in S_t

        remove   u_j·h'_t = 0                           all that h holds along the directions
        scale    u_j·h'_t = scale u_j·h_t               1 changes nothing, 0 removes, -1 mirrors
        revert   u_j·h'_t = u_j·h_t - write_tj          `write_tj = u_j·δ_t`, δ_t being what the fine-tune wrote to the row: leaves
                                                        along the directions what the base model's weights would have
        clamp    u_j·h'_t = |h'_t| bound                if the cosine is out of range: the nearest bound

    The first three are one linear system, `U Uᵀ x = target - U h`, solved jointly by conjugate residuals: the u_j of two matrices need
    not be orthogonal, and may be dependent, or nearly so (what h holds along a difference of directions of length below 0.001 may
    stay). Clamp takes the directions outside their range one after the other, in their order, until all are within 1e-5 of it, at most
    32 rounds. A row of role -1 is clamped to the widest range over roles; a bound at or beyond -1 or 1, such as the empty range of a role
    without calibration, is not gone to.

    A row that is not finite (see `cos_minmax`) is in no range: all directions fire, and wherever one has fired such a row comes out as NaN.
    Directions are unit rows or, as padding, zero ones, of cosine 0. Bounds -inf and inf never fire but for such a row.

    Reads hidden twice (the second time mostly from a cache) and writes it once; takes 2 (k + 1) FLOPs per number and, in rows that are
    steered, 2 k more. Where nothing has fired it comes out as it went in, bit for bit; on a CPU such a call copies and returns. On a GPU
    nothing waits for the device. Arithmetic is float32, rounded once to the dtype of `hidden`; back ends agree within rounding.

    >>> hidden, fired = torch.tensor([[0.0, 2.0], [3.0, 4.0], [1.0, 1.0]]), torch.zeros(1, 2, dtype=torch.bool)
    >>> low, high = torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.5, 1.0]])  # the first cosine is at most 0.5
    >>> steer(hidden, torch.eye(2), low, high, torch.tensor([0, 0, -1]), torch.tensor([0, 0, 0]), fired)
    tensor([[0., 2.],
            [0., 4.],
            [0., 1.]])
    >>> fired
    tensor([[ True, False]])

    Shapes: `hidden` [n, d] and the result, `directions` [k, d], `low` and `high` [roles, k], `role` and `sequence` [n], `fired`
    [sequences, k], changed in place, `write` [n, k] with mode revert, `gram` [k, k]: `directions @ directions.T`, which takes k² d
    products if it is not given; any strides. Dtypes: `hidden` and `directions` float32, bfloat16 or float16 each, `role` int64 or int8,
    `sequence` int64, `fired` bool, the others float32.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit, for an unknown mode, a scale that is not finite, one
    of `scale` and `write` without its mode or missing, a role outside [-1, roles) or a sequence outside [0, sequences); also for more than
    128 directions on a GPU. There, where looking at the rows would wait for them, a row of such a role or sequence stays as it is.
    Source: the steering of WeightWatch, Zhong and Raghunathan 2025 (arXiv 2508.00161), which removes one direction after the other.
    """
    if hidden.ndim != 2 or directions.ndim != 2 or low.ndim != 2 or fired.ndim != 2 or hidden.dtype not in FLOATS:
        came = f"hidden is {hidden.dtype} {tuple(hidden.shape)}, directions {tuple(directions.shape)}, low {tuple(low.shape)}"
        raise ValueError(
            f"{came}, fired {tuple(fired.shape)}: expected float32, bfloat16 or float16 [n, d], [k, d], [roles, k] and [sequences, k]"
        )
    (n, d), k, device = hidden.shape, len(directions), hidden.device
    expect("directions", directions, (k, d), device, *FLOATS)
    for name, bound in (("low", low), ("high", high)):
        expect(name, bound, (len(low), k), device, torch.float32)
    if not len(low):
        raise ValueError(f"low is {tuple(low.shape)}: expected the ranges of at least one role")
    expect("role", role, (n,), device, torch.int64, torch.int8)
    expect("sequence", sequence, (n,), device, torch.int64)
    expect("fired", fired, (len(fired), k), device, torch.bool)
    expect_below("role", role, len(low), least=-1)
    expect_below("sequence", sequence, len(fired), least=0)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: expected {', '.join(MODES)}")
    if (scale is not None) != (mode == "scale") or (scale is not None and not math.isfinite(scale)):
        raise ValueError(f"scale is {scale} and mode {mode!r}: mode 'scale' takes a finite number, the others none")
    if (write is not None) != (mode == "revert"):
        given = "given" if write is not None else None
        raise ValueError(f"write is {given} and mode {mode!r}: mode 'revert' takes it, no other")
    if write is not None:
        expect("write", write, (n, k), device, torch.float32)
    if gram is not None:
        expect("gram", gram, (k, k), device, torch.float32)
    if not hidden.numel() or not k:
        return hidden.detach().clone()
    with torch.no_grad():
        if mode == "clamp":  # -1, the role of rows without one, is then the last
            low, high = torch.cat([low, low.amin(0, keepdim=True)]), torch.cat([high, high.amax(0, keepdim=True)])
        changed = fired.contiguous()
        tensors = (tensor.detach().contiguous() for tensor in (hidden, directions, low, high, role.long(), sequence))
        options = (tensor if tensor is None else tensor.detach().contiguous() for tensor in (write, gram))
        steered: Tensor = pick(__name__, hidden).steer(*tensors, changed, mode, scale, *options)
        if changed is not fired:
            fired.copy_(changed)
    return steered
