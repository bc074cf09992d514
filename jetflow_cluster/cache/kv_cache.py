"""The KV tensor and what a page of it costs."""

from __future__ import annotations

import os

import torch


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
    """Zeros ``[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]``; index 1 is K, then V."""
    return torch.zeros(num_layers, 2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device)


def bytes_per_page(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    return num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize


def available_memory_bytes(device: torch.device) -> int:
    """Free memory of the device; on CPU, physical memory that is not in use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
