"""The public names of a package are imported when first used."""

import subprocess
import sys

import pytest


def test_public_names_arrive_on_first_use_and_stay_functions():
    code = """
import sys, wiseft
print(sorted({"torch", "numpy", "wiseft.merging"} & set(sys.modules)))
import wiseft.merging
from wiseft import merge
print(callable(merge), merge is wiseft.merging.merge, "merge" in dir(wiseft))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\nTrue True True\n"


def test_unknown_name_is_an_attribute_error():
    import wiseft

    with pytest.raises(AttributeError, match="marge"):
        wiseft.marge  # noqa: B018
