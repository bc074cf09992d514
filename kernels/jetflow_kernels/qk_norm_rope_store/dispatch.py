"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.cpu import rows
from jetflow_kernels.qk_norm_rope_store.cpu import qk_norm_rope_store_cpu
from jetflow_kernels.shipped import DTYPES, check_head_dim, runs_triton


def qk_norm_rope_store(
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
    """Normalises and rotates the q and k of each row and stores its k and v.

    Args:
        qkv: ``[T, num_heads + 2 * num_kv_heads, head_dim]``, the heads of q, then k, then v, as a fused projection
            gives them; each row contiguous.
        norm_weight: ``[num_heads + num_kv_heads, head_dim]``, of qkv's dtype: the weights of q's heads, then of k's.
            None for models that do not normalise q and k.
        cos: ``[T, 1, head_dim]`` of each row's own position, of qkv's dtype; contiguous.
        sin: as `cos`, its first half negative.
        slot_mapping: int64 ``[T]``: where k and v go. The kernel stores nothing where it is negative, as in rows that
            fill a batch up; the path without kernel takes no such rows.
        k_pages: ``[num_pages, page_size, num_kv_heads, head_dim]``, contiguous, on qkv's device; written to.
        v_pages: as `k_pages`.
        num_heads: of q; 0 where only k and v are wanted.
        eps: added to the mean square.

    Returns:
        q ``[T, num_heads, head_dim]``, of qkv's dtype.

    Raises:
        ValueError: shapes that do not fit each other.
        IndexError: on a CPU, a slot that the pages do not have.
        NotImplementedError: a head size that no kernel is shipped for, on a GPU.
    """
    num_kv_heads, head_dim = k_pages.shape[2], k_pages.shape[3]
    if qkv.shape[1:] != (num_heads + 2 * num_kv_heads, head_dim):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} does not hold {num_heads} heads of q and {num_kv_heads} of k and v, each of "
            f"{head_dim}"
        )
    operands = (qkv, norm_weight, cos, sin, slot_mapping, k_pages, v_pages)
    if runs_triton(qkv.device) and qkv.dtype == k_pages.dtype and qkv.dtype in DTYPES:
        check_head_dim("qk_norm_rope_store", head_dim)
        from jetflow_kernels.qk_norm_rope_store.kernel import qk_norm_rope_store_triton

        return qk_norm_rope_store_triton(*operands, num_heads=num_heads, eps=eps)
    if (q := rows.qk_norm_rope_store(*operands, num_heads=num_heads, eps=eps)) is not None:
        return q
    return qk_norm_rope_store_cpu(*operands, num_heads=num_heads, eps=eps)
