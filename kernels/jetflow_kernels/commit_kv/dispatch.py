"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.commit_kv.reference import commit_kv_reference
from jetflow_kernels.shipped import runs_triton


def commit_kv(kv: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
    """Copies slots in all layers at once, as if all were read before any is written.

    Of two moves of a row, the earlier one's target is not the later one's source: an accepted path ascends, so the
    move to its i-th slot comes from there or from further on. Ranges may overlap in every other way.

    Args:
        kv: ``[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]``, contiguous; written to.
        source_slots: int64 ``[M]``, the moves of all requests one behind the other; or ``[R, M]`` with a row per
            request, filled up with -1, which is no move.
        target_slots: int64 as `source_slots`; distinct. Requests do not share slots.

    Raises:
        ValueError: slots of different shapes.
    """
    if source_slots.shape != target_slots.shape or source_slots.dim() not in (1, 2):
        raise ValueError(
            f"source_slots {tuple(source_slots.shape)} and target_slots {tuple(target_slots.shape)} must be alike, "
            "[M] or [R, M]"
        )
    if runs_triton(kv.device):
        from jetflow_kernels.commit_kv.kernel import commit_kv_triton

        commit_kv_triton(kv, source_slots, target_slots)
    else:
        commit_kv_reference(kv, source_slots, target_slots)
