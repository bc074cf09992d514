"""Moves the KV of accepted nodes behind their prefixes."""

from __future__ import annotations

import torch


def commit_kv(kv: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
    """Copies slots in all layers at once; ranges may overlap, since all are read before any is written.

    Args:
        kv: ``[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]``.
        source_slots: int64 ``[M]``.
        target_slots: int64 ``[M]``, distinct.
    """
    flat = kv.view(kv.shape[0], 2, -1, kv.shape[4] * kv.shape[5])
    flat.index_copy_(2, target_slots, flat.index_select(2, source_slots))
