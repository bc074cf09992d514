"""The KV tensor and what a page of it costs."""

from __future__ import annotations

import torch


def kv_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What K and V of a model of this dtype are kept in. CPUs compute attention in fp32, so half types are widened
    once, when they are stored, and not each time the context is read."""
    return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype


def allocate_kv(
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Zeros ``[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]``; along dim 1, K is 0 and V is 1."""
    return torch.zeros(num_layers, 2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device)


def bytes_per_page(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    return num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize
