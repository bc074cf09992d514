"""The production path on CPU: few calls of `scaled_dot_product_attention`, planned by `schedule.py`.

Grouped-query heads become more query rows, so K and V are never repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.tree_attention.schedule import Block, Group, Layout, Schedule, make_schedule


def tree_attention_cpu(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """See `jetflow_kernels.tree_attention.tree_attention`."""
    key = (q.dtype, q.device, q.shape, k_pages.shape[2])
    schedule = plan.derived.get(key)
    if schedule is None:
        schedule = plan.derived[key] = make_schedule(plan, _layout(q, k_pages.shape[2]))
    assert isinstance(schedule, Schedule)
    dtype = schedule.layout.dtype
    rows = q.to(dtype)
    parts = []
    for group in schedule.groups:
        k, v = _keys(group, k_pages, dtype), _keys(group, v_pages, dtype)
        parts += [_attend(block, group.num_requests, rows, k, v, scale) for block in group.blocks]
    if not parts:
        return torch.empty_like(q)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if schedule.order is not None:
        out = out.index_select(0, schedule.order)
    return out.to(q.dtype)


def _layout(q: torch.Tensor, num_kv_heads: int) -> Layout:
    # On a CPU half types gain nothing in attention of few rows and lose up to sixfold; see the README.
    is_widened = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    return Layout(
        dtype=torch.float32 if is_widened else q.dtype,
        device=q.device,
        num_kv_heads=num_kv_heads,
        rows_per_query=q.shape[1] // num_kv_heads,
        head_dim=q.shape[2],
    )


def _keys(group: Group, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """K or V of a group, ``[G, num_kv_heads, L, head_dim]``: a view, or gathered."""
    num_kv_heads, head_dim = pages.shape[2], pages.shape[3]
    if group.key_slots is None:
        slots = pages.view(1, -1, num_kv_heads, head_dim).narrow(1, group.first_slot, group.num_keys)
    else:
        slots = pages.view(-1, num_kv_heads, head_dim).index_select(0, group.key_slots)
        slots = slots.view(group.num_requests, group.num_keys, num_kv_heads, head_dim)
    return slots.to(dtype).transpose(1, 2)


def _attend(
    block: Block, num_requests: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Output of a block's rows, padding included: ``[G * N, num_heads, head_dim]``."""
    num_rows, num_heads, head_dim = block.num_rows, q.shape[1], q.shape[2]
    num_kv_heads = k.shape[1]
    if block.rows is not None:
        q = q.index_select(0, block.rows)
    elif block.first_row is not None:
        q = q.narrow(0, block.first_row, num_requests * num_rows)
    if block.num_keys < k.shape[2]:
        k, v = k.narrow(2, 0, block.num_keys), v.narrow(2, 0, block.num_keys)
    if num_kv_heads == num_heads:
        q = q.view(num_requests, num_rows, num_heads, head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.bias, scale=scale)
        return out.transpose(1, 2).reshape(-1, num_heads, head_dim)
    q = q.view(num_requests, num_rows, num_kv_heads, -1, head_dim).transpose(1, 2)
    q = q.reshape(num_requests, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.bias, scale=scale)
    out = out.view(num_requests, num_kv_heads, num_rows, -1, head_dim).transpose(1, 2)
    return out.reshape(-1, num_heads, head_dim)
