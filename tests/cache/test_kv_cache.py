"""What the KV tensor is shaped like, and what it costs."""

from __future__ import annotations

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
