"""A fitted model on disk: the options and the training data, in JSON. Fitting takes a second, so it is fitted again when it is read."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from lmcore.record import environment, write_json
from scaling_meta.regressors import REGRESSORS, Fitted, Regressor, regressor
from scaling_meta.schema import BENCHMARKS
from scaling_meta.table import Table

_FORMAT = "scaling-meta model 1"
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A regressor, and the models it was fitted to: their designs and their scores `y` on a benchmark.

    The file holds no weights and nothing that is executed, but what the fit depends on and, to check it, what it predicted.
    """

    benchmark: str
    name: str
    regressor: Regressor
    table: Table
    y: Float64[np.ndarray, " models"]

    def fit(self) -> Fitted:
        """Fit, the same as every time before."""
        return self.regressor.fit(self.table, self.y)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from importlib import metadata

        table = self.table
        libraries = {name: metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")}
        content = {
            "format": _FORMAT, "benchmark": self.benchmark, "regressor": self.name, "options": asdict(self.regressor),  # type: ignore[call-overload]
            "features": table.features, "categories": dict(table.categories), "models": table.models, "families": table.families,
            "released": table.released, "values": [[None if np.isnan(x) else x for x in row] for row in table.values.tolist()],
            "y": self.y, "predicted": self.fit().predict(table), "versions": environment()["versions"] | libraries,
        }  # fmt: skip
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> "SavedModel":
        """Read the file, and fit once to see that its predictions come out again.

        Raises: `UserError` if it is not such a file, or if other versions of the libraries fit something else.
        """
        content = _content(path)
        try:
            table = Table(
                models=tuple(content["models"]),
                features=tuple(content["features"]),
                values=np.array(content["values"], np.float64).reshape(len(content["models"]), len(content["features"])),
                categories={name: tuple(names) for name, names in content["categories"].items()},
                families=tuple(content["families"]),
                released=tuple(content["released"]),
            )
            made = regressor(content["regressor"], BENCHMARKS[content["benchmark"]])
            made = replace(made, **{name: _frozen(value) for name, value in content["options"].items()})  # type: ignore[type-var]
            saved = cls(content["benchmark"], content["regressor"], made, table, np.array(content["y"], np.float64))
            predicted = np.array(content["predicted"], np.float64)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged or was edited ({type(error).__name__}: {error}): fit the model again") from None
        apart = np.abs(saved.fit().predict(table) - predicted).max(initial=0.0) if predicted.shape == saved.y.shape else np.inf
        if not apart <= _TOLERANCE:
            raise UserError(
                f"{path} predicted otherwise when it was written (up to {apart:.2g} apart), with {content.get('versions')}: fit it again"
            )
        return saved


def _content(path: Path) -> dict[str, Any]:
    import orjson

    try:
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the model.json that scaling-meta fit wrote") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): give the model.json that scaling-meta fit wrote") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("regressor") not in REGRESSORS:
        raise UserError(f"{path} is not a model of this version of scaling-meta ({_FORMAT}): give what scaling-meta fit wrote")
    return content


def _frozen(value: Any) -> Any:
    """Lists back to the tuples they were."""
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value
