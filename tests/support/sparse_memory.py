"""Tensors of many gigabytes of which only what is touched takes memory."""

from __future__ import annotations

import math
import mmap

import torch

_MAP_NORESERVE = 0x4000


def sparse_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros; on a GPU, where there is memory enough, an ordinary tensor."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
