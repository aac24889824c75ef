"""The surroundings in which the same task gives the same bits, and the way back out of them."""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numba
import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmcore.errors import UserError


@contextmanager
def deterministic(model: nn.Module, *, seed: int, threads: int) -> Iterator[None]:
    """Run the block so that its bits depend on model, data and `seed` alone, on one machine; put everything back at its end.

    Inside: the generators of Python, NumPy, the CPU and the model's GPUs start from `seed`; `threads` threads on the CPU; only torch's
    deterministic algorithms, attention by its plain formula on GPUs, float32 products in full (no TF32); no autocast. All of it is
    process-wide while the block runs, so two tasks at a time are two processes, never two threads. Another machine, version of torch or
    kind of GPU may give other bits.
    Raises: `UserError` where a GPU needs CUBLAS_WORKSPACE_CONFIG, or attention there is neither eager nor sdpa.
    """
    gpus = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    if gpus:
        require_deterministic_gpu(model)
    with ExitStack() as stack:
        stack.enter_context(_settings_of_torch(threads))
        stack.enter_context(_generators(seed, gpus))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if gpus:
            stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def require_deterministic_gpu(model: nn.Module) -> None:
    """Raise `UserError` for what makes a GPU's bits vary and only the caller can change."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise UserError("on a GPU, set the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise UserError(f'attention is "{attention}", whose backward pass is not deterministic: load the model with "sdpa"')


@contextmanager
def _settings_of_torch(threads: int) -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    debug, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    # In this order: numba, when it is first asked, starts its threads and changes how many torch uses.
    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    of_cpu, of_gpu, products_of_gpu = (
        cast(Any, backend) for backend in (torch.backends.mkldnn, torch.backends.cudnn, torch.backends.cuda)
    )
    products = [of_cpu.matmul, of_cpu.conv, of_cpu.rnn, products_of_gpu.matmul, of_gpu.conv, of_gpu.rnn]
    precisions = [product.fp32_precision for product in products]
    try:
        numba.set_num_threads(min(threads, cast(Any, numba.config).NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True) would import a compiler too
        memory.fill_uninitialized_memory = False  # it would write every new tensor twice
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        for product in products:
            product.fp32_precision = "ieee"
        yield
    finally:
        numba.set_num_threads(of_numba)
        torch.set_num_threads(of_torch)
        torch.set_deterministic_debug_mode(debug)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        for product, precision in zip(products, precisions, strict=True):
            product.fp32_precision = precision


@contextmanager
def _generators(seed: int, gpus: list[int]) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (a model may draw from it)
    try:
        with torch.random.fork_rng(devices=gpus):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the other GPUs too
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
