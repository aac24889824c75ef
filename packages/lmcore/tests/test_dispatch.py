"""The back end follows the device, and the environment variable where it is set."""

import pytest
import torch

from lmcore import dispatch

OP = "lmcore.ops.linear_logprob"


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_variable_is_read_at_each_call(backend, monkeypatch):
    assert dispatch.pick(OP, torch.zeros(1)).__name__ == f"{OP}.reference"
    monkeypatch.setenv("LMCORE_BACKEND", backend)
    assert dispatch.pick(OP, torch.zeros(1)).__name__ == f"{OP}.{backend}"


def test_cpu_tensors_go_to_numba_where_the_op_has_it():
    assert dispatch.pick("lmcore.random", torch.zeros(1)).__name__ == "lmcore.random.numba"


def test_unknown_back_end_is_refused(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="reference, numba, triton"):
        dispatch.pick(OP, torch.zeros(1))


def test_missing_back_end_says_so_and_runs_the_reference(monkeypatch):
    monkeypatch.setenv("LMCORE_BACKEND", "numba")
    with pytest.warns(UserWarning, match="no numba implementation"):
        assert dispatch.pick(OP, torch.zeros(1)).__name__ == f"{OP}.reference"
