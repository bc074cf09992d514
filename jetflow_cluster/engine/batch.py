"""From a plan and its trees to one ragged batch, and back from an accepted path to slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.tree_attention import plan_tree_attention
from jetflow_kernels.upload import upload


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The rows of one step."""

    forward: ForwardBatch
    #: First row of each item.
    row_starts: list[int]
    #: Rows whose logits are needed, in order.
    logits_rows: list[int]
    #: Where each item's rows begin among `logits_rows`; items that choose no token and want no logits have none.
    logits_starts: list[int]


def page_table_tensor(page_lists: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """int32 ``[R, P]``, padded with zeros."""
    width = max(len(pages) for pages in page_lists)
    padded = [pages + [0] * (width - len(pages)) for pages in page_lists]
    return upload(torch.tensor(padded, dtype=torch.int32), device)


def chain_parents(num_rows: int) -> range:
    """Parents of a chain: each row hangs on the one before it."""
    return range(-1, num_rows - 1)


def build_batch(plan: StepPlan, trees: Sequence[DraftTree], page_size: int, device: torch.device) -> StepBatch:
    """Lays the plan's prompt chunks and trees out as rows.

    Args:
        plan: what to compute; pages for every row are allocated.
        trees: one per item; ignored for items that are prompt chunks.
        page_size: KV slots per page.
        device: where the tensors go.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    parents: list[int] = []
    query_lens: list[int] = []
    row_starts: list[int] = []
    logits_rows: list[int] = []
    logits_starts: list[int] = []
    for item, tree in zip(plan.items, trees, strict=True):
        request, context = item.request, item.request.num_computed
        first = len(token_ids)
        if item.num_rows == 1 and item.is_last:
            num_rows = tree.num_nodes
            token_ids += tree.token_ids
            positions += [context + depth for depth in tree.depths]
            parents += tree.parents
        else:
            num_rows = item.num_rows
            token_ids += request.token_ids[context : context + num_rows]
            positions += range(context, context + num_rows)
            parents += chain_parents(num_rows)
        slots += request.pages.slots(context, context + num_rows)
        query_lens.append(num_rows)
        row_starts.append(first)
        logits_starts.append(len(logits_rows))
        logits_rows += _logits_rows(item, first, num_rows)
    attention = plan_tree_attention(
        query_lens=query_lens,
        context_lens=[item.request.num_computed for item in plan.items],
        page_table=page_table_tensor([item.request.pages.pages for item in plan.items], device),
        parents=upload(torch.tensor(parents, dtype=torch.int32), device),
        page_size=page_size,
        is_chain=[item.num_rows > 1 or tree.num_nodes == 1 for item, tree in zip(plan.items, trees, strict=True)],
    )
    forward = ForwardBatch(
        token_ids=upload(torch.tensor(token_ids, dtype=torch.int64), device),
        positions=upload(torch.tensor(positions, dtype=torch.int64), device),
        slot_mapping=upload(torch.tensor(slots, dtype=torch.int64), device),
        attention=attention,
        max_position=max(positions, default=None),
    )
    return StepBatch(forward=forward, row_starts=row_starts, logits_rows=logits_rows, logits_starts=logits_starts)


def _logits_rows(item: ScheduledRequest, first: int, num_rows: int) -> range:
    """Rows of one item that need logits: a whole tree, a prompt's last row, or all for prompt log-probabilities."""
    if wants_prompt_logprobs(item):
        return range(first, first + num_rows)
    if not item.is_last:
        return range(0)
    return range(first, first + num_rows) if item.num_rows == 1 else range(first + num_rows - 1, first + num_rows)


def wants_prompt_logprobs(item: ScheduledRequest) -> bool:
    """True when this item's rows carry log-probabilities of prompt tokens not reported yet."""
    request = item.request
    return request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt_token_ids)
