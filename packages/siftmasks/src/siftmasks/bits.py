"""One bit per weight: bit i of a tensor, along its flat index, is bit `i % 8` of byte `i // 8`; unused bits of the last byte are 0."""

import torch
from torch import Tensor


def pack_bits(flags: Tensor) -> Tensor:
    """Pack booleans of any shape into uint8 [ceil(size / 8)].

    >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad(flags.flatten().to(torch.uint8), (0, -flags.numel() % 8))
    return (bits.view(-1, 8) << _places(flags)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Return the first `size` bits as booleans [size].

    >>> unpack_bits(torch.tensor([5, 1], dtype=torch.uint8), 9).int()
    tensor([1, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.int32)
    """
    return (packed[:, None] >> _places(packed) & 1).flatten()[:size].bool()


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=tensor.device)
