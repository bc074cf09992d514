"""The definition."""

from __future__ import annotations

import torch


def qk_norm_rope_store_reference(
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
    num_kv_heads, head_dim = k_pages.shape[2:]
    qk, v = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
    if norm_weight is not None:
        qk = qk / (qk.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm_weight
    first, second = qk.chunk(2, -1)
    qk = qk * cos + torch.cat((second, first), -1) * sin
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_pages.view(-1, num_kv_heads, head_dim)[slot] = qk[row, num_heads:]
            v_pages.view(-1, num_kv_heads, head_dim)[slot] = v[row]
    return qk[:, :num_heads]
