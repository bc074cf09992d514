"""The path of every device and dtype without a kernel: plain torch, one operation behind the other."""

from __future__ import annotations

import torch

from jetflow_kernels.pointwise import rms_norm, rotate
from jetflow_kernels.store_kv import store_kv


def qk_norm_rope_store_cpu(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """See `jetflow_kernels.qk_norm_rope_store.qk_norm_rope_store`."""
    num_kv_heads = k_pages.shape[2]
    qk, v = qkv.split_with_sizes([num_heads + num_kv_heads, num_kv_heads], 1)
    if norm_weight is not None:
        qk = rms_norm(qk, norm_weight, eps)
    q, k = rotate(qk, cos, sin).split_with_sizes([num_heads, num_kv_heads], 1)
    store_kv(k, v, k_pages, v_pages, slot_mapping)
    return q
