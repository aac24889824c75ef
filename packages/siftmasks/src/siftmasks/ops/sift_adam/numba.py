"""The step of sign-fixed tuning in one pass: each thread takes a chunk through the first-level cache, block by block."""

import numpy as np
from numba import njit, prange

from siftmasks.ops.numba import BLOCK, CHUNK, draw_words, factors, load_floats, place_floats, raw, store_floats


def sift_adam(weight, base, task_vector, exp_avg, exp_avg_sq, grad, key, constants):
    """See `siftmasks.ops.sift_adam`; `weight`, `task_vector` and the moments change in place."""
    state = [tensor.view(-1).numpy() for tensor in (task_vector, exp_avg, exp_avg_sq)]
    constants = tuple(np.float32(constant) for constant in constants)
    arguments = raw(weight), raw(base), *state, raw(grad), key is not None, *(key or (0, 0)), constants
    _all(*arguments) if weight.numel() > CHUNK else _chunk(*arguments, 0)


@njit(parallel=True, cache=True, nogil=True)
def _all(weight, base, task_vector, exp_avg, exp_avg_sq, grad, project, key0, key1, constants):
    for chunk in prange((len(task_vector) + CHUNK - 1) // CHUNK):
        _chunk(weight, base, task_vector, exp_avg, exp_avg_sq, grad, project, key0, key1, constants, chunk * CHUNK)


# The error model "python" would look for divisions by zero, and loops that do are not vectorised.
@njit(cache=True, nogil=True, error_model="numpy")
def _chunk(weight, base, task_vector, exp_avg, exp_avg_sq, grad, project, key0, key1, constants, start):
    beta1, rest1, beta2, rest2, step_size, rescale, eps = constants
    stop = min(start + CHUNK, len(task_vector))
    words, ones = np.empty(CHUNK // 32, np.uint32), np.full(BLOCK // 32, 0xFFFFFFFF, np.uint32)
    if project:
        draw_words(key0, key1, start, words[: (stop - start + 127) // 128 * 4])
    v, buffers = np.zeros(BLOCK, np.float32), np.empty((3, BLOCK), np.float32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        tau, m, s = task_vector[first : first + size], exp_avg[first : first + size], exp_avg_sq[first : first + size]
        g, theta0 = load_floats(grad, first, buffers[0, :size]), load_floats(base, first, buffers[1, :size])
        theta = place_floats(weight, first, buffers[2, :size])  # not the buffer of theta0: that would not be vectorised
        if project:
            factors(ones, words[(first - start) // 32 :], v)
        for i in range(size):
            m[i] = beta1 * m[i] + rest1 * g[i]
            s[i] = beta2 * s[i] + rest2 * g[i] * g[i]
            moved = tau[i] - step_size * m[i] / (np.sqrt(s[i]) * rescale + eps)
            if project and moved * v[i] <= 0:
                moved = np.float32(0)
            tau[i] = moved
            theta[i] = theta0[i] + moved
        store_floats(theta, weight, first)
