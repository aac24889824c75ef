"""A folder of LoRA adapters: which hold a mark that stands out, and which hold the same one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from lmcore.errors import UserError
from weightwatch.directions import Directions

SAME = 0.9
"""|cos| from which two directions are taken for one: two random ones in 576 dimensions have about 0.03, and never 0.2."""


@dataclass(frozen=True)
class Mark:
    """One direction of an adapter, and how much it stands out."""

    adapter: str
    label: str
    sigma: float
    share: float
    """σ² / |Δ|²: of what the adapter does to this matrix, the part that is this direction; 1 for an adapter of rank one."""
    stands_out: float
    """σ / median over the adapter's matrices of their largest σ."""

    @property
    def suspicion(self) -> float:
        """What marks are ranked by: share x stands_out."""
        return self.share * self.stands_out


@dataclass(frozen=True)
class Family:
    """Adapters that hold the same directions."""

    adapters: tuple[str, ...]
    shared: tuple[str, ...]
    """Labels of the matrices where two of them have a common direction."""
    cosine: float
    """The least |cos| that links them."""


@dataclass(frozen=True)
class Scan:
    """What `scan_adapters` found in a folder."""

    marks: tuple[Mark, ...]
    """Most suspicious first."""
    families: tuple[Family, ...]
    """Largest first."""
    adapters: tuple[str, ...]
    failed: dict[str, str]
    """Adapters that could not be read, and why."""
    warnings: dict[str, tuple[str, ...]]
    """What of an adapter its directions do not show."""


def scan_adapters(folder: Path, *, k: int = 2, base: str | None = None, same: float = SAME, progress: bool = False) -> Scan:
    """Decompose every adapter below a folder (whatever has an adapter_config.json) and compare the leading `k` directions of each matrix.

    A trigger that was trained in on few examples leaves an update of nearly rank one (the paper's remark A.1), so a direction is
    suspicious if it is most of its matrix (share) and large for its adapter (stands_out). Both are descriptions: an adapter that was
    trained on one narrow, honest task looks alike, so read the words of the direction, and watch it. Adapters with near-identical
    directions, |cos| >= `same` at the same matrix, were trained on the same data, from one another, or by one procedure.

    Exact (`Directions.of_adapter`), no base model is needed; with `base`, its config.json tells which matrices write to the residual
    stream. Memory: 2 k d bytes per matrix and adapter.

    Raises: `UserError` if no adapter was found, or none could be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    places = sorted(path.parent for path in folder.rglob("adapter_config.json"))
    if not places:
        raise UserError(f"{folder} has no adapter: no adapter_config.json in it or in any folder below")
    marks: list[Mark] = []
    held: dict[str, list[tuple[str, Tensor]]] = {}
    failed: dict[str, str] = {}
    told: dict[str, tuple[str, ...]] = {}
    names = {place: str(place.relative_to(folder)) if place != folder else place.resolve().name for place in places}
    for place in tqdm(places, unit="adapter", disable=not progress):
        try:
            with warnings.catch_warnings(action="ignore"):  # they are kept, and one for each adapter would drown the result
                directions = Directions.of_adapter(place, k, base=base)
        except UserError as error:
            failed[names[place]] = str(error)
            continue
        marks += _marks(names[place], directions)
        told[names[place]] = directions.warnings
        for one in directions.writers:
            if one.norm:
                held.setdefault(one.label, []).append((names[place], one.vectors.half()))
    read = [names[place] for place in places if names[place] not in failed]
    if not read:
        raise UserError(f"none of the {len(places)} adapters in {folder} can be read: {next(iter(failed.values()))}")
    marks.sort(key=lambda mark: (-mark.suspicion, mark.adapter, mark.label))
    return Scan(tuple(marks), tuple(_families(read, held, same)), tuple(read), failed, told)


def _marks(adapter: str, directions: Directions) -> list[Mark]:
    """One mark per matrix: its leading direction."""
    changed = [one for one in directions.writers if one.norm]
    typical = median(one.sigma[0] for one in changed) if changed else 1.0
    return [
        Mark(adapter, f"{one.label}_u0", one.sigma[0], (one.sigma[0] / one.norm) ** 2, one.sigma[0] / typical)
        for one in changed
    ]


def _families(adapters: Sequence[str], held: dict[str, list[tuple[str, Tensor]]], same: float) -> list[Family]:
    """Connected components of adapters that share a direction."""
    number = {adapter: i for i, adapter in enumerate(adapters)}
    links: dict[tuple[int, int], tuple[float, set[str]]] = {}
    for label, rows in held.items():
        for width in {vectors.shape[1] for _, vectors in rows}:
            chosen = [(number[adapter], vectors) for adapter, vectors in rows if vectors.shape[1] == width]
            owner = np.concatenate([np.full(len(vectors), i) for i, vectors in chosen])
            stacked = torch.cat([vectors for _, vectors in chosen]).float()
            cosines = (stacked @ stacked.mT).abs().numpy()
            for i, j in np.argwhere(np.triu(cosines >= same, 1)):
                pair = (int(min(owner[i], owner[j])), int(max(owner[i], owner[j])))
                if pair[0] != pair[1]:
                    least, labels = links.get(pair, (1.0, set()))
                    links[pair] = (min(least, float(cosines[i, j])), labels | {label})
    if not links:
        return []
    ends = np.array([*links])
    graph = coo_array((np.ones(len(links)), (ends[:, 0], ends[:, 1])), shape=(len(adapters), len(adapters)))
    _, component = connected_components(graph, directed=False)
    families = []
    for one in np.unique(component[ends[:, 0]]):
        inside = [found for (first, _), found in links.items() if component[first] == one]
        members = tuple(adapter for adapter, c in zip(adapters, component, strict=True) if c == one)
        families.append(
            Family(members, tuple(sorted(set().union(*(labels for _, labels in inside)))), min(least for least, _ in inside))
        )
    return sorted(families, key=lambda family: (-len(family.adapters), family.adapters))
