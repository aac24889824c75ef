"""The pass on a CPU: each row is widened, subtracted and squared while it is in the first-level cache."""

import numpy as np
import torch
from numba import njit

BITS = {
    torch.bfloat16: (torch.uint16, 16),
    torch.float32: (torch.uint32, 0),
}  # a word, and how far it lies below those of float32


def difference_sums(base, post, gains, rounding):
    """See `weightwatch.ops.difference_sums`."""
    alone = base is None
    (after, after_shift), (before, before_shift) = _words(post), _words(post if alone else base)
    ones = torch.ones(len(post))
    before_gain, after_gain = (ones if gain is None else gain for gain in gains)
    before_gain = torch.zeros(len(post)) if alone else before_gain
    delta, rows, columns = np.empty(post.shape, np.float32), np.zeros((4, len(post))), np.zeros((2, post.shape[1]))
    scales = before_gain.numpy(), after_gain.numpy()
    changed = _pass(before, after, before_shift, after_shift, *scales, *map(np.float32, rounding), delta, rows, columns)
    return torch.from_numpy(delta), torch.from_numpy(rows), torch.from_numpy(columns), changed


def _words(weights):
    """Return the bits of weights, and by how much to shift them to the left."""
    weights = weights.contiguous() if weights.dtype in BITS else weights.float().contiguous()
    word, shift = BITS[weights.dtype]
    return weights.view(word).numpy(), np.uint32(shift)


# Sums in any order: they are vectorised. Loops of few arrays each, of which a compiler sees that they do not overlap.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _pass(base, post, base_shift, post_shift, base_gain, post_gain, smallest, share, delta, rows, columns):
    changed = 0
    for i in range(len(post)):
        line = delta[i]
        before, after, both = 0.0, 0.0, 0.0
        for j in range(len(line)):
            old = np.uint32(np.uint32(base[i, j]) << base_shift).view(np.float32) * base_gain[i]
            new = np.uint32(np.uint32(post[i, j]) << post_shift).view(np.float32) * post_gain[i]
            line[j] = new - old
            before += np.float64(old) * np.float64(old)
            after += np.float64(new) * np.float64(new)
        total = columns[0]
        for j in range(len(line)):
            square = np.float64(line[j]) * np.float64(line[j])
            total[j] += square
            both += square
            changed += line[j] != 0
        rows[0, i], rows[1, i], rows[2, i] = before, after, both
        rows[3, i] = _variances(post[i], post_shift, smallest, share * post_gain[i], columns[1])
    return changed


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _variances(words, shift, smallest, share, total):
    """Add the variances of a row to those of its columns, and return their sum."""
    whole = 0.0
    for j in range(len(words)):
        power = np.uint32((np.uint32(words[j]) << shift) & np.uint32(0x7F800000)).view(np.float32)  # 2^floor(log2|w|)
        deviation = np.float64(max(power, smallest) * share)
        total[j] += deviation * deviation
        whole += deviation * deviation
    return whole
