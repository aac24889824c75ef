"""Which implementation of an op should run."""

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_found = cache(find_spec)


def pick(package: str, *tensors: Any) -> ModuleType:
    """Import and return the module beside the op `package` that should run on `tensors`.

    CUDA tensors go to `triton`; CPU tensors and arrays to `numba` where the op has it, else to `reference`. `LMCORE_BACKEND`, one of these
    three and read at each call, overrides (with `TRITON_INTERPRET=1`, that is how the Triton interpreter is chosen); where the op lacks it,
    the reference runs with a warning (Python shows it once). Raises: `ValueError` for another word in `LMCORE_BACKEND`.

    >>> pick("lmcore.ops.linear_logprob", torch.zeros(1)).__name__
    'lmcore.ops.linear_logprob.reference'
    """
    on_cpu = "numba" if _found(f"{package}.numba") else "reference"
    usual = "triton" if any(getattr(tensor, "is_cuda", False) for tensor in tensors) else on_cpu
    wanted = os.environ.get("LMCORE_BACKEND") or usual
    if wanted not in ("reference", "numba", "triton"):
        raise ValueError(f"LMCORE_BACKEND={wanted!r} is not one of reference, numba, triton")
    if not _found(f"{package}.{wanted}"):
        warnings.warn(f"{package} has no {wanted} implementation: its reference runs", stacklevel=2)
        wanted = "reference"
    return import_module(f"{package}.{wanted}")
