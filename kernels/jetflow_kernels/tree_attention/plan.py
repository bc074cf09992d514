"""What `tree_attention` needs to know of a batch, computed once and used by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(kw_only=True)
class TreeAttentionPlan:
    """A ragged batch of prompt chunks, single tokens and trees over paged KV. See `plan_tree_attention`."""

    #: Rows of each request.
    query_lens: list[int]
    #: First row of each request, and behind the last one the number of all rows; R + 1 numbers.
    query_start: list[int]
    #: Tokens of each request that were in the cache before its rows.
    context_lens: list[int]
    #: int32 or int64 ``[R, P]``, padded with any valid page.
    page_table: torch.Tensor
    #: int32 or int64 ``[T]``, local to each request, negative for roots.
    parents: torch.Tensor
    #: KV slots per page.
    page_size: int
    #: Rows see all rows of their request.
    bidirectional: bool
    #: Requests whose rows form a chain.
    is_chain: list[bool]
    #: What an implementation derived from the plan, kept for the next layer.
    derived: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def num_requests(self) -> int:
        """Requests of the batch."""
        return len(self.query_lens)

    @property
    def num_rows(self) -> int:
        """Rows of all requests."""
        return self.query_start[-1]

    @cached_property
    def ancestor_bits(self) -> torch.Tensor:
        """int32 ``[T, W]`` on the CPU: bit ``j % 32`` of word ``j // 32`` says that a row sees row j of its request.

        W fits the largest tree. Rows of chains are zero: they see every row up to their own.

        Raises:
            ValueError: a row whose parent is not before it.
        """
        trees = [n for n, chain in zip(self.query_lens, self.is_chain, strict=True) if not chain]
        num_words = -(-max(trees, default=0) // 32)
        parents = self.parents.tolist() if trees else []
        packed = bytearray()
        for request, count in enumerate(self.query_lens):
            if self.is_chain[request]:
                packed += bytes(4 * num_words * count)
                continue
            first = self.query_start[request]
            for bits in _ancestors(parents[first : first + count], request):
                packed += bits.to_bytes(4 * num_words, "little")
        if not packed:
            return torch.zeros(self.num_rows, num_words, dtype=torch.int32)
        return torch.frombuffer(packed, dtype=torch.int32).view(self.num_rows, num_words)


def _ancestors(parents: list[int], request: int) -> list[int]:
    """Of each row, one bit for itself and one for each ancestor."""
    seen: list[int] = []
    for row, parent in enumerate(parents):
        if parent >= row:
            raise ValueError(f"row {row} of request {request} has parent {parent}, which is not before it")
        seen.append((seen[parent] if parent >= 0 else 0) | 1 << row)
    return seen


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
        page_table: int32 or int64 ``[R, P]``, padded with any valid page; not to be changed while the plan is in use.
        parents: int32 or int64 ``[T]``: row index within the request, below the row's own; -1 for roots.
        page_size: KV slots per page.
        bidirectional: rows see all rows of their request, not their ancestors alone.
        is_chain: requests of which each row's parent is the row before; None looks, which reads `parents`.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    num_requests = len(query_lens)
    query_start = [0, *accumulate(query_lens)]
    if len(context_lens) != num_requests or page_table.shape[0] != num_requests:
        raise ValueError(
            f"{num_requests} query_lens, {len(context_lens)} context_lens, page_table of {page_table.shape[0]} rows"
        )
    if is_chain is not None and len(is_chain) != num_requests:
        raise ValueError(f"{num_requests} query_lens, {len(is_chain)} is_chain")
    if min(query_lens, default=1) < 1 or min(context_lens, default=0) < 0 or page_size < 1:
        raise ValueError(
            f"query_lens {query_lens} from 1, context_lens {context_lens} from 0, page_size {page_size} from 1"
        )
    if parents.shape[0] != query_start[-1]:
        raise ValueError(f"parents has {parents.shape[0]} rows, query_lens sum up to {query_start[-1]}")
    longest = max((q + c for q, c in zip(query_lens, context_lens, strict=True)), default=0)
    if longest > page_table.shape[1] * page_size:
        raise ValueError(f"{longest} slots do not fit {page_table.shape[1]} pages of {page_size}")
    if is_chain is None:
        local = parents.tolist()
        is_chain = [
            local[first : first + count] == list(range(-1, count - 1))
            for first, count in zip(query_start, query_lens, strict=False)
        ]
    return TreeAttentionPlan(
        query_lens=list(query_lens),
        query_start=query_start,
        context_lens=list(context_lens),
        page_table=page_table,
        parents=parents,
        page_size=page_size,
        bidirectional=bidirectional,
        is_chain=list(is_chain),
    )
