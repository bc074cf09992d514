"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.cpu import attention
from jetflow_kernels.shipped import DTYPES, runs_triton
from jetflow_kernels.tree_attention.cpu import tree_attention_cpu
from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.tree_attention.static import JoinedAttention, StaticAttention, static_attention_torch

_HALF = (torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


def _is_for_triton(q: torch.Tensor, k_pages: torch.Tensor) -> bool:
    """fp64, and half queries beside fp32 pages, stay with plain torch, which serves every device."""
    return runs_triton(q.device) and q.dtype == k_pages.dtype and q.dtype in DTYPES


def tree_attention(
    plan: TreeAttentionPlan | StaticAttention | JoinedAttention,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of every row to its request's context, itself and its ancestors.

    Args:
        plan: of this batch, or tensors that the device fills, or both, joined; the same one serves all layers.
        q: ``[T, num_heads, head_dim]`` in fp64, fp32, bf16 or fp16; rows may be strided.
        k_pages: ``[num_pages, page_size, num_kv_heads, head_dim]``, contiguous, on q's device, of q's dtype or, beside
            a half q, fp32; K of the batch's own rows is stored already. Slots that no row may see are never read into a
            result, NaN or not.
        v_pages: as `k_pages`.
        scale: factor of the scores, as a rule ``head_dim ** -0.5``.

    Returns:
        ``[T, num_heads, head_dim]``, new, of q's dtype. Scores and sums of half types are fp32 at least.

    Raises:
        ValueError: shapes that do not fit the plan, or tensors of different dtypes or devices.
        NotImplementedError: a device that nothing here serves; the message names it.
    """
    if q.device.type not in _DEVICES:
        served = ", ".join(_DEVICES)
        raise NotImplementedError(f"tree_attention does not run on device {str(q.device)!r}, only on: {served}")
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    if num_rows != plan.num_rows or k_pages.shape != v_pages.shape or k_pages.shape[1] != plan.page_size:
        raise ValueError(
            f"q {tuple(q.shape)}, k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)} do not fit a plan of "
            f"{plan.num_rows} rows and pages of {plan.page_size}"
        )
    if num_heads % num_kv_heads or head_dim != k_pages.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and pages {tuple(k_pages.shape)} disagree on heads or head_dim")
    fits = k_pages.dtype in (q.dtype, torch.float32) if q.dtype in _HALF else k_pages.dtype == q.dtype
    if not (fits and k_pages.dtype == v_pages.dtype and q.device == k_pages.device == v_pages.device):
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k_pages {k_pages.dtype} on {k_pages.device}, "
            f"v_pages {v_pages.dtype} on {v_pages.device}"
        )
    if isinstance(plan, JoinedAttention):
        rows, behind = q.split((plan.first.num_rows, plan.second.num_rows))
        first = tree_attention(plan.first, rows, k_pages, v_pages, scale=scale)
        return torch.cat((first, tree_attention(plan.second, behind, k_pages, v_pages, scale=scale)))
    if isinstance(plan, StaticAttention):
        if not _is_for_triton(q, k_pages):
            return static_attention_torch(plan, q, k_pages, v_pages, scale=scale)
        from jetflow_kernels.tree_attention.kernel import attend

        return attend(plan.metadata, q, k_pages, v_pages, scale=scale)
    if _is_for_triton(q, k_pages):
        from jetflow_kernels.tree_attention.kernel import tree_attention_triton

        return tree_attention_triton(plan, q, k_pages, v_pages, scale=scale)
    out = attention.tree_attention(plan, q, k_pages, v_pages, scale=scale) if q.is_cpu else None
    return tree_attention_cpu(plan, q, k_pages, v_pages, scale=scale) if out is None else out
