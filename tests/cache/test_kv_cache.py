"""What the KV tensor is shaped like and costs, and what memory there is for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jetflow_cluster.cache import kv_cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_page_costs_its_share_of_the_tensor(dtype: torch.dtype) -> None:
    kv = kv_cache.allocate_kv(
        num_layers=3, num_pages=7, page_size=5, num_kv_heads=2, head_dim=9, dtype=dtype, device=torch.device("cpu")
    )
    assert kv.shape == (3, 2, 7, 5, 2, 9)
    assert not kv.any()
    page = kv_cache.bytes_per_page(num_layers=3, page_size=5, num_kv_heads=2, head_dim=9, dtype=dtype)
    assert page * 7 == kv.numel() * kv.element_size()


def test_memory_of_this_machine() -> None:
    assert 2**20 < kv_cache.available_memory_bytes(torch.device("cpu")) < 2**50


def test_memory_that_the_kernel_can_reclaim_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  700 kB\nHugePages_Total:  0\n")
    assert kv_cache._host_memory_bytes(meminfo) == 700 * 1024
    assert kv_cache._host_memory_bytes(tmp_path / "missing") > 0


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 600 + 150), ("400", 0), ("max", sys.maxsize)],
    ids=["limited", "exceeded", "unlimited"],
)
def test_a_container_s_limit_counts(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 150\n")
    assert kv_cache._container_memory_bytes(tmp_path) == expected
    assert kv_cache._container_memory_bytes(tmp_path / "missing") == sys.maxsize
