"""The Triton kernel: one launch for all rows and heads."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration
from jetflow_kernels.shipped import DTYPES, HEAD_DIMS, TRITON_NAMES

#: Elements of half a tile.
_TILE = 1024
_NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["num_rows", "num_heads", "num_kv_heads", "has_norm"], do_not_specialize_on_alignment=["p_slots"]
)
def qk_norm_rope_store_kernel(
    p_qkv, p_weight, p_cos, p_sin, p_slots, p_q, p_k, p_v,
    eps, s_row, num_rows, num_heads, num_kv_heads, head_dim, has_norm,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (rows, head): a tile of rows of one head of q, k or v, as two halves."""
    i_rows, i_head = tl.program_id(0), tl.program_id(1)
    half = head_dim // 2
    o_t = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    o_h = tl.arange(0, BLOCK_H)
    m_t = o_t < num_rows
    m_x = m_t[:, None] & (o_h < half)[None, :]
    o_row = o_t.to(tl.int64)
    # [BLOCK_T, BLOCK_H]
    p_x = p_qkv + (o_row * s_row + i_head * head_dim)[:, None] + o_h[None, :]
    b_first = tl.load(p_x, mask=m_x, other=0.0)
    b_second = tl.load(p_x + half, mask=m_x, other=0.0)
    dtype = b_first.dtype
    if i_head < num_heads + num_kv_heads:
        b_left, b_right = b_first.to(tl.float32), b_second.to(tl.float32)
        if has_norm:
            b_mean = (tl.sum(b_left * b_left, 1) + tl.sum(b_right * b_right, 1)) / head_dim
            b_scale = tl.rsqrt(b_mean + eps)[:, None]
            # [BLOCK_H]
            p_w = p_weight + i_head * head_dim + o_h
            b_left = b_left * b_scale * tl.load(p_w, mask=o_h < half, other=0.0).to(tl.float32)[None, :]
            b_right = b_right * b_scale * tl.load(p_w + half, mask=o_h < half, other=0.0).to(tl.float32)[None, :]
        # [BLOCK_T, BLOCK_H]: both halves of cos are the same, the second one of sin is the positive one.
        o_angle = (o_row * head_dim)[:, None] + o_h[None, :]
        b_cos = tl.load(p_cos + o_angle, mask=m_x, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_angle + half, mask=m_x, other=0.0).to(tl.float32)
        b_first = (b_left * b_cos - b_right * b_sin).to(dtype)
        b_second = (b_right * b_cos + b_left * b_sin).to(dtype)
    if i_head < num_heads:
        p_y = p_q + ((o_row * num_heads + i_head) * head_dim)[:, None] + o_h[None, :]
        tl.store(p_y, b_first, mask=m_x)
        tl.store(p_y + half, b_second, mask=m_x)
    else:
        # [BLOCK_T]
        b_slot = tl.load(p_slots + o_t, mask=m_t, other=-1)
        m_y = m_x & (b_slot >= 0)[:, None]
        i_kv = (i_head - num_heads) % num_kv_heads
        o_y = ((b_slot * num_kv_heads + i_kv) * head_dim)[:, None] + o_h[None, :]
        if i_head < num_heads + num_kv_heads:
            tl.store(p_k + o_y, b_first, mask=m_y)
            tl.store(p_k + o_y + half, b_second, mask=m_y)
        else:
            tl.store(p_v + o_y, b_first, mask=m_y)
            tl.store(p_v + o_y + half, b_second, mask=m_y)


def qk_norm_rope_store_triton(
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
    num_rows, num_all, head_dim = qkv.shape
    if qkv.stride()[1:] != (head_dim, 1) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"rows of qkv, cos and sin must be contiguous; qkv has strides {qkv.stride()}")
    weight = qkv if norm_weight is None else norm_weight
    if not cos.dtype == sin.dtype == weight.dtype == qkv.dtype:
        raise ValueError(f"qkv is {qkv.dtype}, cos {cos.dtype}, sin {sin.dtype}, norm_weight {weight.dtype}")
    q = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not num_rows:
        return q
    constants = _constants(head_dim)
    qk_norm_rope_store_kernel[(triton.cdiv(num_rows, constants["BLOCK_T"]), num_all)](
        # Without heads of q nothing is written to it, but a pointer must be there.
        qkv, weight, cos, sin, slot_mapping, q if num_heads else qkv, k_pages, v_pages,
        eps, qkv.stride(0), num_rows, num_heads, k_pages.shape[2], head_dim, int(norm_weight is not None),
        **constants, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return q


def shipped_configurations() -> list[KernelConfiguration]:
    """One per dtype and padded head size; everything else is an argument."""
    pointers = ("p_qkv", "p_weight", "p_cos", "p_sin", "p_q", "p_k", "p_v")
    numbers = ("s_row", "num_rows", "num_heads", "num_kv_heads", "head_dim", "has_norm")
    found = []
    for dtype in DTYPES:
        for head_dim in sorted({triton.next_power_of_2(d) for d in HEAD_DIMS}):
            types = dict.fromkeys(pointers, f"*{TRITON_NAMES[dtype]}") | dict.fromkeys(numbers, "i32")
            found.append(
                KernelConfiguration(
                    name=f"qk_norm_rope_store-{TRITON_NAMES[dtype]}-d{head_dim}",
                    kernel=qk_norm_rope_store_kernel,
                    types=types | {"p_slots": "*i64", "eps": "fp32"},
                    multiples_of_16=frozenset({*pointers, "s_row", "head_dim"}),
                    constants=_constants(head_dim),
                    num_warps=_NUM_WARPS,
                    num_stages=3,
                )
            )
    return found


def _constants(head_dim: int) -> dict[str, Any]:
    block_h = triton.next_power_of_2(head_dim // 2)
    return {"BLOCK_T": _TILE // block_h, "BLOCK_H": block_h}
