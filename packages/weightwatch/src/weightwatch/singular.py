"""The leading singular vectors of a large matrix from a few products with it, and a certificate of how right they are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcore import random

BLOCK = 16
"""Vectors that go through a product at once: fewer converge with fewer products, but a processor takes 16 in the time of 10."""
FIRST = 44
"""Vectors beyond k in the basis from which on the residuals are looked at."""
TOLERANCE = 0.01
"""Largest residual, as a share of the singular value, that the certificate accepts."""


@dataclass(frozen=True)
class SingularVectors:
    """The k largest singular values of a [d, m] matrix A and their vectors; of each left one, the entry of largest magnitude is positive.

    `residuals` are sqrt((|A v - σ u|² + |Aᵀu - σ v|²) / 2): A has a singular value within that distance of σ (Weyl), and u lies within
    an angle of sine residual / gap of the space of all singular values nearer than `gap` (Davis and Kahan).
    """

    left: Tensor
    """float32 [k, d], unit rows u_i."""
    right: Tensor
    """float32 [k, m], unit rows v_i; zeros where σ = 0."""
    values: Tensor
    """float64 [k], descending."""
    residuals: Tensor
    """float64 [k]."""
    method: str
    """"krylov", "gram" or "exact"."""

    def certified(self, floor: float) -> bool:
        """Whether every vector of a value above `floor` has a residual of at most `TOLERANCE` of its value."""
        return bool(((self.residuals <= TOLERANCE * self.values) | (self.values <= floor)).all())

    def first(self, k: int) -> "SingularVectors":
        """The k largest."""
        return SingularVectors(self.left[:k], self.right[:k], self.values[:k], self.residuals[:k], self.method)


def top_singular_vectors(matrix: Any, k: int, *, seed: int = 0, name: str = "", floor: float = 0.0) -> SingularVectors:
    """Compute the k leading singular vectors of `matrix` A by randomised block Krylov iteration, or exactly where that fails.

        Q = an orthonormal basis of span{A Ω, (A Aᵀ) A Ω, (A Aᵀ)² A Ω, ...},   Ω normal [m, 16],   u and σ those of Q Qᵀ A.

    Each block of 16 vectors costs two products. They are added until every vector of a value above `floor` has a residual of at most
    0.01 of its value (below the floor lies noise, whose vectors cannot be told apart): first as the recurrence of the blocks tells it,
    then as a product with the matrix does. Where the basis would hold half of all dimensions, the eigenvectors of the Gram matrix in
    float64 are taken instead.

    A residual proves that u is a singular vector, not that none larger was missed. That would take an Ω that is orthogonal to the
    missed one, which for normal numbers is as good as impossible, but not proved for the one matrix at hand.

    Ω depends on (`seed`, `name`) alone: with one torch thread, a machine gives the same bits each time. Other machines and numbers of
    threads add up in another order, by which vectors above the floor differ less than by their residual.

    Shapes: `matrix` [d, m], float32: a tensor, or a `Difference`, which multiplies without being formed. k is clamped to min(d, m).
    Raises: `ValueError` for k < 1.
    Source: Musco and Musco 2015 (arXiv 1504.05477), Algorithm 2, as a block Lanczos process with full reorthogonalisation; that blocks
    smaller than k do: Meyer, Musco and Musco 2024 (arXiv 2305.02535).
    """
    d, m = matrix.shape
    if k < 1:
        raise ValueError(f"k = {k} singular vectors: at least 1 was expected")
    k = min(k, d, m)
    largest = min(d, m) // 2
    normal = random.normal(seed, f"weightwatch {name}", m * BLOCK).reshape(BLOCK, m)
    basis, images, gram = torch.empty(0, d), torch.empty(0, m, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
    size, following = 0, matrix @ normal.mT
    block = torch.linalg.qr(following).Q.mT
    while max(size + BLOCK, k + FIRST) <= largest:
        basis, images = (_with_room(rows, size + BLOCK) for rows in (basis, images))
        gram = _with_room(_with_room(gram, size + BLOCK).mT, size + BLOCK).mT
        new, size = slice(size, size + BLOCK), size + BLOCK
        image = (matrix.mT @ block.mT).mT
        basis[new], images[new] = block, image  # images in float64, whose squares keep all digits of float32 numbers
        gram[:size, new] = images[:size] @ images[new].mT
        gram[new, :size] = gram[:size, new].mT
        following = matrix @ image.mT
        for _ in range(2):  # once leaves what rounding mixed in
            following -= basis[:size].mT @ (basis[:size] @ following)
        block, link = torch.linalg.qr(following)
        block = block.mT
        if size < k + FIRST:
            continue
        squares, rotation = torch.linalg.eigh(gram[:size, :size])
        values, rotation = squares.flip(0)[:k].clamp(min=0).sqrt(), rotation.mT.flip(0)[:k]
        # A Aᵀ takes the basis to itself but for its last block, which `link` carries into the next.
        told = (rotation[:, new] @ link.double().mT).norm(dim=1) / values
        if bool(((told <= TOLERANCE * values) | (values <= floor)).all()):
            left, right = rotation.float() @ basis[:size], _divided(rotation @ images[:size], values)
            missing = (matrix @ right.float().mT).mT.double() - left.double() * values[:, None]  # Aᵀu = σ v by construction
            found = oriented(left, right, values, missing.norm(dim=1), "krylov")
            if found.certified(floor):
                return found
    return _from_gram(matrix, k)


def _from_gram(matrix: Any, k: int) -> SingularVectors:
    """By eigenvectors of the smaller Gram matrix in float64: values are right to 1e-8 of the largest."""
    dense = matrix if isinstance(matrix, Tensor) else matrix.matrix
    wide = (dense if dense.shape[0] <= dense.shape[1] else dense.mT).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    values, near = squares.flip(0)[:k].clamp(min=0).sqrt(), vectors.mT.flip(0)[:k]
    far = _divided(near @ wide, values)
    missing = far @ wide.mT - near * values[:, None]
    left, right = (near, far) if dense.shape[0] <= dense.shape[1] else (far, near)
    return oriented(left, right, values, missing.norm(dim=1), "gram")


def _with_room(rows: Tensor, count: int) -> Tensor:
    """A tensor that begins with `rows` and has at least `count`."""
    if len(rows) >= count:
        return rows
    return torch.cat([rows, torch.empty(max(count, 8 * BLOCK), *rows.shape[1:], dtype=rows.dtype)])


def _divided(vectors: Tensor, values: Tensor) -> Tensor:
    """Unit rows from rows of length σ; zeros where σ is."""
    return torch.where(values[:, None] > 0, vectors / values[:, None], 0.0)


def oriented(left: Tensor, right: Tensor, values: Tensor, missing: Tensor, method: str) -> SingularVectors:
    """Choose the signs of rows u and v; `missing` is |A v - σ u|, the other half of the certificate is zero."""
    signs = left.gather(1, left.abs().argmax(dim=1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    left, right = ((side * signs).float().contiguous() for side in (left, right))
    return SingularVectors(left, right, values, missing / 2**0.5, method)
