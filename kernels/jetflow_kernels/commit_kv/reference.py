"""The definition, and the path of devices without a kernel."""

from __future__ import annotations

import torch


def commit_kv_reference(kv: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
    """See `jetflow_kernels.commit_kv.commit_kv`. All is read before any is written."""
    if source_slots.dim() > 1:
        m_move = source_slots >= 0
        source_slots, target_slots = source_slots[m_move], target_slots[m_move]
    flat = kv.view(kv.shape[0], 2, -1, kv.shape[4] * kv.shape[5])
    flat.index_copy_(2, target_slots, flat.index_select(2, source_slots))
