"""Public names that are imported when first used, so that a command line answers without importing torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def attach(package: str, topics: Mapping[str, str]) -> None:
    """Give `package` the attributes named in `topics` (name -> submodule), each imported on first use.

    Call it in `__init__.py` beside an `if TYPE_CHECKING:` block with the same imports, which editors and type checkers read.
    A submodule may not bear the name of what is taken from it: importing it would put the module in the place of the function.
    """
    module = sys.modules[package]
    assert all(name != topic for name, topic in topics.items()), "a submodule would hide what is named like it"

    def __getattr__(name: str) -> Any:  # noqa: N807 (the name that PEP 562 gives it)
        if name not in topics:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{topics[name]}"), name)
        setattr(module, name, value)
        return value

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    module.__dir__ = lambda: sorted({*vars(module), *topics})  # type: ignore[method-assign]
