"""The leading singular vectors of a large matrix from a few products with it, and a certificate of how right they are."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcore import random

BLOCKS = 12, 16
"""Vectors that go through a product at once, of matrices up to `SMALL` and beyond: fewer converge with fewer of them in all, but a product
that waits for memory takes as long for 16 as for 12."""
SMALL = 1 << 21
"""Entries of a matrix that stays in a cache."""
FIRST = 44
"""Vectors beyond k in the basis from which on the residuals are looked at."""
TOLERANCE = 0.01
"""Largest residual, as a share of the singular value, that the certificate accepts."""


ROOM = 96
"""Rows that memory is taken for at a time."""
ORTHOGONAL, REPAIRS = 1e-5, 3
"""Largest product of a new block with the basis (Frobenius), and how often it is orthogonalised again to get there."""
EVEN = 32.0
"""Ratio of the first value to the last up to which A v may be added up from products that were made: their rounding, about 1e-7 of the
square of the ratio, is then far below what is measured. It would lie in the basis, where a residual does not."""


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

        Q = an orthonormal basis of span{A Ω, (A Aᵀ) A Ω, (A Aᵀ)² A Ω, ...},   Ω normal [m, b],   u and σ those of Q Qᵀ A.

    Each block of b = 12 vectors (16 of a large matrix) costs two products. They are added until every vector of a value above `floor` has
    a residual of at most 0.01 of its value (below the floor lies noise, whose vectors cannot be told apart): first as the recurrence of the
    blocks tells it, then as products with the matrix do. Where the basis would hold half of all dimensions, the eigenvectors of the Gram
    matrix in float64 are taken instead.

    A residual proves that u is a singular vector, not that none larger was missed. That would take an Ω that is orthogonal to the
    missed one, which for normal numbers is as good as impossible, but not proved for the one matrix at hand.

    Ω depends on (`seed`, `name`) alone: with one torch thread, a machine gives the same bits each time. Other machines and numbers of
    threads add up in another order, by which vectors above the floor differ less than by their residual.

    Shapes: `matrix` [d, m], float32: a tensor, or a `Difference`, which multiplies without being formed. k is clamped to min(d, m).
    Raises: `ValueError` for k < 1.
    Source: Musco and Musco 2015 (arXiv 1504.05477), Algorithm 2, as a block Lanczos process with full reorthogonalisation; that blocks
    smaller than k do: Meyer, Musco and Musco 2024 (arXiv 2305.02535).
    """
    return BlockKrylov(matrix, k, seed=seed, name=name).until(floor)


class BlockKrylov:
    """The iteration of `top_singular_vectors`, which can be asked again for a lower floor and goes on where it stopped."""

    def __init__(self, matrix: Any, k: int, *, seed: int = 0, name: str = ""):
        d, m = matrix.shape
        if k < 1:
            raise ValueError(f"k = {k} singular vectors: at least 1 was expected")
        self._matrix, self._k, self._block, self._size = matrix, min(k, d, m), BLOCKS[d * m > SMALL], 0
        self._due = self._k + FIRST  # the size from which on the residuals are looked at
        self._basis, self._products = torch.empty(2, 0, d)  # rows q and A Aᵀ q
        self._images = torch.empty(0, m, dtype=torch.float64)  # rows Aᵀ q: squares of float32 numbers keep all their digits
        self._gram = torch.empty(0, 0, dtype=torch.float64)  # of the images
        normal = random.normal(seed, f"weightwatch {name}", m * self._block).reshape(self._block, m)
        self._following = (matrix @ normal.mT).mT  # of the last products what the basis lacks
        self._found: SingularVectors | None = None

    def until(self, floor: float) -> SingularVectors:
        """The k largest, certified above `floor`."""
        if self._found is None or not (self._found.certified(floor) or self._found.method == "gram"):
            self._found = self._iterated(floor) or _from_gram(self._matrix, self._k)
        return self._found

    def _iterated(self, floor: float) -> SingularVectors | None:
        largest = min(self._matrix.shape) // 2
        while max(self._size + self._block, self._k + FIRST) <= largest:
            self._extend()
            if self._size >= self._due and (found := self._looked_at(floor)):
                return found
        return None

    def _extend(self) -> None:
        """Add a block."""
        block, basis = torch.linalg.qr(self._following.mT).Q, self._basis[: self._size]
        for _ in range(REPAIRS):  # where next to nothing follows, rounding is most of it
            if not float((overlap := basis @ block).norm()) > ORTHOGONAL:
                break
            block = torch.linalg.qr(block - basis.mT @ overlap).Q
        self._size += self._block
        self._basis, self._products, self._images = (
            _with_room(rows, self._size) for rows in (self._basis, self._products, self._images)
        )
        self._gram = _with_room(_with_room(self._gram, self._size).mT, self._size).mT
        new, basis = slice(self._size - self._block, self._size), self._basis[: self._size]
        image = self._matrix.mT @ block
        product = (self._matrix @ image).mT
        self._basis[new], self._images[new], self._products[new] = block.mT, image.mT, product
        links = self._images[: self._size] @ self._images[new].mT
        self._gram[: self._size, new], self._gram[new, : self._size] = links, links.mT
        following = product - links.mT.float() @ basis
        self._following = following - (following @ basis.mT) @ basis  # once leaves what rounding mixed in

    def _looked_at(self, floor: float) -> SingularVectors | None:
        """The vectors if they are certified above `floor`; if not, when to look again."""
        size = self._size
        squares, rotation = torch.linalg.eigh(self._gram[:size, :size])
        values, rotation = squares.flip(0)[: self._k].clamp(min=0).sqrt(), rotation.mT.flip(0)[: self._k]
        turn = rotation.float()
        # A Aᵀ takes the basis to itself but for its last block, of which a part is left over.
        told = (turn[:, -self._block :] @ self._following).norm(dim=1).double() / values
        worst = float(torch.where(values > floor, told / (TOLERANCE * values), 0.0).max())
        if worst > 1:
            self._due = size + self._block * math.ceil(math.log10(worst))  # a block seldom makes residuals ten times smaller
            return None
        left, right = turn @ self._basis[:size], _divided(rotation @ self._images[:size], values)
        if values[-1] * EVEN > values[0]:
            product = _divided((turn @ self._products[:size]).double(), values)
        else:
            product = (self._matrix @ right.float().mT).mT.double()
        missing = product - left.double() * values[:, None]  # Aᵀu = σ v by construction
        found = oriented(left, right, values, missing.norm(dim=1), "krylov")
        return found if found.certified(floor) else None


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
    return torch.cat([rows, torch.empty(max(count, ROOM), *rows.shape[1:], dtype=rows.dtype)])


def _divided(vectors: Tensor, values: Tensor) -> Tensor:
    """Unit rows from rows of length σ; zeros where σ is."""
    return torch.where(values[:, None] > 0, vectors / values[:, None], 0.0)


def oriented(left: Tensor, right: Tensor, values: Tensor, missing: Tensor, method: str) -> SingularVectors:
    """Choose the signs of rows u and v; `missing` is |A v - σ u|, the other half of the certificate is zero."""
    signs = left.gather(1, left.abs().argmax(dim=1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    left, right = ((side * signs).float().contiguous() for side in (left, right))
    return SingularVectors(left, right, values, missing / 2**0.5, method)
