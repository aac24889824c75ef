"""The design matrix: what every regressor sees of the models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int

from lmcore.errors import UserError


@dataclass(frozen=True, eq=False)
class Table:
    """Rows are models, columns are design features.

    `values` is float64: NaN is missing; a category is its code 0, 1, ..., the place of its name in `categories`, which has an entry for
    each categorical feature; sizes and tokens are the natural logarithms `log_params` and `log_tokens`. `families` and `released`
    ("YYYY-MM", or "" if unknown) are those of the rows: families of models must not be split where a fair test is wanted.

    >>> values = np.array([[20.0, 25.0, 1.0], [21.0, np.nan, np.nan]])
    >>> table = Table(("a", "b"), ("log_params", "log_tokens", "block_type"), values, {"block_type": ("parallel", "sequential")},
    ...               ("A", "B"), ("2023-01", ""))
    >>> table.flops.round(3), table.rows(np.array([1])).models, table.select(["block_type"]).values.tolist()
    (array([46.792,    nan]), ('b',), [[1.0], [nan]])
    """

    models: tuple[str, ...]
    features: tuple[str, ...]
    values: Float64[np.ndarray, "models features"]
    categories: Mapping[str, tuple[str, ...]]
    families: tuple[str, ...]
    released: tuple[str, ...]

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        for name, count in (("models", len(self.models)), ("families", len(self.families)), ("released", len(self.released))):
            if count != rows:
                raise ValueError(f"values has {rows} rows, {name} has {count}")
        if columns != len(self.features):
            raise ValueError(f"values has {columns} columns, features has {len(self.features)}")
        for name, names in self.categories.items():
            codes = self.column(name)
            if not set(codes[~np.isnan(codes)].tolist()) <= set(range(len(names))):
                raise ValueError(f"{name} has other codes than 0 to {len(names) - 1}, those of its categories")

    def __len__(self) -> int:
        return len(self.models)

    def select(self, features: Sequence[str]) -> "Table":
        """The same rows with these columns, in this order. Raises: `UserError` for a feature that is not there."""
        columns = [self._position(name) for name in features]
        categories = {name: self.categories[name] for name in features if name in self.categories}
        return replace(self, features=tuple(features), values=self.values[:, columns], categories=categories)

    def rows(self, index: Int[np.ndarray, " chosen"] | Bool[np.ndarray, " models"]) -> "Table":
        """These rows, by number or by a mask."""
        chosen = np.arange(len(self))[index].tolist()
        models, families, released = (
            tuple(names[row] for row in chosen) for names in (self.models, self.families, self.released)
        )
        return replace(self, models=models, values=self.values[chosen], families=families, released=released)

    def column(self, name: str) -> Float64[np.ndarray, " models"]:
        """The values of one feature. Raises: `UserError` if it is not there."""
        return self.values[:, self._position(name)]

    @property
    def flops(self) -> Float64[np.ndarray, " models"]:
        """Natural logarithm of the training compute in FLOPs, 6 x params x tokens."""
        return math.log(6) + self.column("log_params") + self.column("log_tokens")

    def with_missing_indicators(self) -> "Table":
        """Append a column `<feature> missing`, 1 where the value is missing and else 0, for each feature with missing values."""
        missing = np.isnan(self.values)
        some = [column for column in range(len(self.features)) if missing[:, column].any()]
        features = (*self.features, *(f"{self.features[column]} missing" for column in some))
        return replace(
            self, features=features, values=np.concatenate([self.values, missing[:, some].astype(np.float64)], axis=1)
        )

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.features)}

    def _position(self, name: str) -> int:
        if name not in self._positions:
            raise UserError(f"the table has no feature {name}: it has {', '.join(self.features)}")
        return self._positions[name]
