"""Calls of `rows.c`. Each takes what it can serve and returns None for the rest, which is plain torch's."""

from __future__ import annotations

import torch

from jetflow_kernels.cpu.library import HALF, cpu_kernels, is_plain

#: Elements from which on rows are split among torch's threads: below, waking them costs more than they do.
_LARGE = 1 << 16
#: As in `rows.c`.
_MAX_HEAD_DIM = 512


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`jetflow_kernels.pointwise.rms_norm` of rows ``[T, n]``, contiguous in themselves, with a weight ``[n]``."""
    half = HALF.get(x.dtype)
    if half is None or not _is_rows(x) or weight.dtype is not x.dtype or weight.requires_grad:
        return None
    num_rows, size = x.shape
    functions = cpu_kernels().functions
    if functions is None or weight.shape != (size,) or not weight.is_contiguous():
        return None
    out = torch.empty_like(x)
    operands = x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), num_rows, size, eps, half
    if num_rows * size < _LARGE:
        functions.held.rms_norm(*operands, 1)
    else:
        functions.released.rms_norm(*operands, torch.get_num_threads())
    return out


def silu_mul(x: torch.Tensor) -> torch.Tensor | None:
    """`jetflow_kernels.pointwise.silu_mul` of rows ``[T, 2 * n]``, contiguous in themselves."""
    half = HALF.get(x.dtype)
    if half is None or not _is_rows(x):
        return None
    num_rows, size = x.shape[0], x.shape[1] // 2
    functions = cpu_kernels().functions
    if functions is None or x.shape[1] % 2:
        return None
    out = x.new_empty((num_rows, size))
    operands = x.data_ptr(), x.stride(0), out.data_ptr(), num_rows, size, half
    if num_rows * size < _LARGE:
        functions.held.silu_mul(*operands, 1)
    else:
        functions.released.silu_mul(*operands, torch.get_num_threads())
    return out


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
) -> torch.Tensor | None:
    """`jetflow_kernels.qk_norm_rope_store.qk_norm_rope_store`, whose shapes are checked there.

    Raises:
        IndexError: a slot that the pages do not have; nothing is written.
    """
    half, half_pages = HALF.get(qkv.dtype), HALF.get(k_pages.dtype)
    if half is None or half_pages is None or half_pages > half or not is_plain(qkv):
        return None
    functions = cpu_kernels().functions
    num_rows, heads, head_dim = qkv.shape
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    if (
        functions is None
        or not _heads_fit(qkv, norm_weight, cos, sin, num_heads + num_kv_heads)
        or not _pages_fit(num_rows, slot_mapping, k_pages, v_pages)
    ):
        return None
    num_slots = num_pages * page_size
    q = qkv.new_empty((num_rows, num_heads, head_dim))
    is_large = num_rows * heads * head_dim >= _LARGE
    failed = (functions.released if is_large else functions.held).qk_norm_rope_store(
        qkv.data_ptr(),
        qkv.stride(0),
        None if norm_weight is None else norm_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slot_mapping.data_ptr(),
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        num_rows,
        num_slots,
        num_heads,
        num_kv_heads,
        head_dim,
        eps,
        half,
        half_pages,
        torch.get_num_threads() if is_large else 1,
    )
    if failed:
        raise IndexError(f"slot_mapping holds what is not one of the {num_slots} slots of the pages")
    return q


def _is_rows(x: torch.Tensor) -> bool:
    return is_plain(x) and x.dim() == 2 and x.stride(1) == 1


def _heads_fit(
    qkv: torch.Tensor, norm_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, num_weights: int
) -> bool:
    """True where heads, weights and angles lie as `rows.c` reads them."""
    dtype, (num_rows, _, head_dim) = qkv.dtype, qkv.shape
    if norm_weight is not None and not (
        norm_weight.dtype is dtype and norm_weight.shape == (num_weights, head_dim) and norm_weight.is_contiguous()
    ):
        return False
    num_angles = num_rows * head_dim
    return (
        qkv.stride()[1:] == (head_dim, 1)
        and head_dim % 2 == 0
        and head_dim <= _MAX_HEAD_DIM
        and cos.dtype is dtype
        and sin.dtype is dtype
        and cos.numel() == num_angles
        and sin.numel() == num_angles
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def _pages_fit(num_rows: int, slot_mapping: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> bool:
    """True where slots and pages lie as `rows.c` reads them."""
    return (
        slot_mapping.dtype is torch.int64
        and slot_mapping.numel() == num_rows
        and slot_mapping.is_contiguous()
        and slot_mapping.is_cpu
        and k_pages.is_contiguous()
        and v_pages.is_contiguous()
        and k_pages.is_cpu
        and v_pages.dtype is k_pages.dtype
        and v_pages.shape == k_pages.shape
    )
