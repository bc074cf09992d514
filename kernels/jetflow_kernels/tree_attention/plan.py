"""What `tree_attention` needs to know of a batch, computed once and used by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(kw_only=True)
class TreeAttentionPlan:
    """A ragged batch of prompt chunks, single tokens and trees over paged KV. See `plan_tree_attention`."""

    query_lens: list[int]
    context_lens: list[int]
    #: int32 ``[R, P]``.
    page_table: torch.Tensor
    #: int32 ``[T]``, local to each request, -1 for roots.
    parents: torch.Tensor
    page_size: int
    bidirectional: bool
    #: Requests whose rows form a chain.
    is_chain: list[bool]
    #: What an implementation derived from the plan, kept for the next layer.
    derived: dict[object, object] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of all requests."""
        return sum(self.query_lens)


def plan_tree_attention(
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: torch.Tensor,
    parents: torch.Tensor,
    page_size: int,
    bidirectional: bool = False,
    is_chain: Sequence[bool] | None = None,
) -> TreeAttentionPlan:
    """Checks a batch and notes what all layers share.

    Args:
        query_lens: rows of each request, at least 1.
        context_lens: tokens of each request that were in the cache before its rows.
        page_table: int32 or int64 ``[R, P]``, padded with any valid page.
        parents: int32 or int64 ``[T]``: row index within the request, below the row's own; -1 for roots.
        page_size: KV slots per page.
        bidirectional: rows see all rows of their request, not their ancestors alone.
        is_chain: requests of which each row's parent is the row before; None looks.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_requests, num_rows = len(query_lens), sum(query_lens)
    if len(context_lens) != num_requests or page_table.shape[0] != num_requests:
        raise ValueError(
            f"{num_requests} query_lens, {len(context_lens)} context_lens, page_table of {page_table.shape[0]} rows"
        )
    if parents.shape[0] != num_rows:
        raise ValueError(f"parents has {parents.shape[0]} rows, query_lens sum up to {num_rows}")
    longest = max((q + c for q, c in zip(query_lens, context_lens, strict=True)), default=0)
    if longest > page_table.shape[1] * page_size:
        raise ValueError(f"{longest} slots do not fit {page_table.shape[1]} pages of {page_size}")
    if is_chain is None:
        local, chains = parents.tolist(), []
        first = 0
        for count in query_lens:
            chains.append(local[first : first + count] == list(range(-1, count - 1)))
            first += count
        is_chain = chains
    return TreeAttentionPlan(
        query_lens=list(query_lens),
        context_lens=list(context_lens),
        page_table=page_table,
        parents=parents,
        page_size=page_size,
        bidirectional=bidirectional,
        is_chain=list(is_chain),
    )
