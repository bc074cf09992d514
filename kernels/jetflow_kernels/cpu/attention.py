"""The call of `attention.c`; returns None for what it does not serve, which is `scaled_dot_product_attention`'s."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from jetflow_kernels.cpu.library import HALF, cpu_kernels, is_plain

if TYPE_CHECKING:
    from jetflow_kernels.tree_attention.plan import TreeAttentionPlan

#: Scores from which on tasks are split among torch's threads.
_LARGE = 1 << 11
#: As in `attention.c`.
_WIDTH, _MAX_HEAD_DIM = 16, 256
_TREE, _CHAIN, _BIDIRECTIONAL = range(3)
_NO_PAGE = 2


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """A plan as `attention.c` reads it, for one number of rows per task."""

    requests: torch.Tensor
    first_task: torch.Tensor
    page_table: torch.Tensor
    ancestors: torch.Tensor
    num_scores: int


def tree_attention(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor | None:
    """`jetflow_kernels.tree_attention.tree_attention`, whose shapes are checked there.

    Raises:
        IndexError: a page that is not there.
    """
    half = HALF.get(q.dtype)
    functions = cpu_kernels().functions
    _, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    if (
        half is None
        or functions is None
        or k_pages.dtype is not torch.float32
        or head_dim % _WIDTH
        or head_dim > _MAX_HEAD_DIM
        or not (is_plain(q) and k_pages.is_contiguous() and v_pages.is_contiguous())
        or q.stride()[1:] != (head_dim, 1)
    ):
        return None
    rows_per_task = 4 if head_dim <= 64 else 2 if head_dim <= 128 else 1
    layout = _layout(plan, num_heads, num_kv_heads, rows_per_task)
    out = torch.empty(q.shape, dtype=q.dtype)
    is_large = layout.num_scores >= _LARGE
    failed = (functions.released if is_large else functions.held).tree_attention(
        q.data_ptr(),
        q.stride(0),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        layout.requests.data_ptr(),
        layout.first_task.data_ptr(),
        layout.page_table.data_ptr(),
        layout.ancestors.data_ptr(),
        out.data_ptr(),
        plan.num_requests,
        layout.page_table.shape[1],
        k_pages.shape[0],
        plan.page_size,
        layout.ancestors.shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        rows_per_task,
        scale,
        half,
        torch.get_num_threads() if is_large else 1,
    )
    if failed & _NO_PAGE:
        raise IndexError(f"page_table names what is not one of the {k_pages.shape[0]} pages")
    return None if failed else out


def _layout(plan: TreeAttentionPlan, num_heads: int, num_kv_heads: int, rows_per_task: int) -> _Layout:
    """Made once per plan, and kept with it for the next layers."""
    key = ("c", num_heads, num_kv_heads, rows_per_task)
    kept = plan.derived.get(key)
    if isinstance(kept, _Layout):
        return kept
    requests: list[int] = []
    num_tasks: list[int] = []
    num_scores = 0
    per_key = num_heads // num_kv_heads
    for first, rows, context, is_chain in zip(
        plan.query_start, plan.query_lens, plan.context_lens, plan.is_chain, strict=False
    ):
        kind = _BIDIRECTIONAL if plan.bidirectional else _CHAIN if is_chain else _TREE
        requests += (first, rows, context, kind)
        num_tasks.append(num_kv_heads * -(-rows * per_key // rows_per_task))
        num_scores += rows * num_heads * (context + rows)
    made = _Layout(
        requests=torch.tensor(requests, dtype=torch.int64),
        first_task=torch.tensor([0, *accumulate(num_tasks)], dtype=torch.int64),
        page_table=plan.page_table.to(torch.int32).contiguous(),
        ancestors=plan.ancestor_bits,
        num_scores=num_scores,
    )
    plan.derived[key] = made
    return made
