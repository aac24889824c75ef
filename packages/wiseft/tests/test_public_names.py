"""The public names of a package are imported when first used."""

import subprocess
import sys

import pytest


def test_public_names_arrive_on_first_use_and_stay_functions():
    code = """
import sys, wiseft
assert not {"torch", "numpy", "wiseft.merging"} & set(sys.modules)
import wiseft.merging
from wiseft import merge
assert callable(merge) and merge is wiseft.merging.merge and "merge" in dir(wiseft)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    import wiseft

    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        wiseft.marge  # noqa: B018
