"""The KV tensor and what a page of it costs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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


def available_memory_bytes(device: torch.device) -> int:
    """Memory of the device that can be had without swapping; on CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_host_memory_bytes(Path("/proc/meminfo")), _container_memory_bytes(Path("/sys/fs/cgroup")))


def _host_memory_bytes(meminfo: Path) -> int:
    """What the kernel would give, caches that it can drop included."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory_bytes(cgroup: Path) -> int:
    """Room under the limit of the control group (version 2) whose root a container sees; else no bound."""
    try:
        limit, current = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - current + int(fields["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return sys.maxsize
