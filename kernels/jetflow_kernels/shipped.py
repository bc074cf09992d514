"""What the Triton kernels are shipped for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Triton's names of them.
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def check_head_dim(op: str, head_dim: int) -> None:
    """Raises NotImplementedError, with the sizes that there are, for another one."""
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise NotImplementedError(f"head_dim = {head_dim}: {op} has kernels for {sizes}")


def size_class(size: int, sizes: Sequence[int]) -> int:
    """The smallest of ascending powers of two, or other sizes, that holds `size`; above them all the next power."""
    return next((known for known in sizes if known >= size), 1 << max(size - 1, 0).bit_length())


def is_interpreted() -> bool:
    """True where kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(device: torch.device) -> bool:
    """True on GPUs, and on the CPU when ``TRITON_INTERPRET=1`` asks for Triton's interpreter."""
    return device.type == "cuda" or is_interpreted()
