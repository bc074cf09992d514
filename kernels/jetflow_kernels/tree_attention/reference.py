"""The definition, one row at a time."""

from __future__ import annotations

import torch

from jetflow_kernels.tree_attention.plan import TreeAttentionPlan


def tree_attention_reference(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """See `jetflow_kernels.tree_attention.tree_attention`."""
    out = torch.empty_like(q)
    per_kv_head = q.shape[1] // k_pages.shape[2]
    first = 0
    for r, (num_rows, context) in enumerate(zip(plan.query_lens, plan.context_lens, strict=True)):
        for i in range(num_rows):
            visible = list(range(context))
            if plan.bidirectional:
                visible += range(context, context + num_rows)
            else:
                node = i
                while node >= 0:
                    visible.append(context + node)
                    node = int(plan.parents[first + node])
            pages = plan.page_table[r].long()[[j // plan.page_size for j in visible]]
            offsets = [j % plan.page_size for j in visible]
            k = k_pages[pages, offsets].repeat_interleave(per_kv_head, 1)
            v = v_pages[pages, offsets].repeat_interleave(per_kv_head, 1)
            weights = (torch.einsum("hd,jhd->hj", q[first + i], k) * scale).softmax(-1)
            out[first + i] = torch.einsum("hj,jhd->hd", weights, v)
        first += num_rows
    return out
