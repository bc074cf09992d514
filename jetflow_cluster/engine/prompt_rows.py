"""Prompt chunks beside a step on static buffers: their rows lie behind those of the trees, in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jetflow_cluster.engine.batch import chain_parents, page_table_tensor
from jetflow_cluster.engine.protocols import ScheduledRequest
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_kernels.tree_attention import JoinedAttention, StaticAttention, TreeAttentionPlan, plan_tree_attention
from jetflow_kernels.upload import upload


@dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Rows of N prompt tokens on the device. Of a prompt's last chunk the last row chooses a token; its request has a
    row among the R of the step, where it has no tree."""

    #: int64 ``[3, N]``: token ids, positions, and slots.
    rows: torch.Tensor
    attention: TreeAttentionPlan
    #: Rows that choose, counted from the first of the prompts, int64 ``[P]``.
    last_rows: torch.Tensor
    #: For each request of the step which of `last_rows` is its own, int32 ``[R]``; -1 for those that decode and those
    #: that are not there.
    choosers: torch.Tensor

    def behind(self, batch: ForwardBatch) -> ForwardBatch:
        """The rows of a static step, then these."""
        own = (batch.token_ids, batch.positions, batch.slot_mapping)
        token_ids, positions, slots = (torch.cat(pair) for pair in zip(own, self.rows.unbind(0), strict=True))
        assert isinstance(batch.attention, StaticAttention)
        attention = JoinedAttention(first=batch.attention, second=self.attention)
        return ForwardBatch(token_ids=token_ids, positions=positions, slot_mapping=slots, attention=attention)

    def choosing(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Of the rows of `behind` those whose logits are read: the `num_rows` of the step, then the prompts' last."""
        return torch.cat((hidden[:num_rows], hidden.index_select(0, self.last_rows + num_rows)))

    def roots(self, counts: torch.Tensor, first_rows: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes of trees and their first rows among `choosing`, both int32 ``[R]``; a prompt's end is a bare root."""
        is_prompt = self.choosers >= 0
        own = torch.where(is_prompt, self.choosers + num_rows, first_rows[: len(counts)])
        return torch.where(is_prompt, 1, counts).to(torch.int32), own.to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class PromptNumbers:
    """`PromptRows` in plain numbers, as ranks tell one another."""

    token_ids: list[int]
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]
    page_lists: list[list[int]]
    last_rows: list[int]
    choosers: list[int]

    def rows(self, page_size: int, device: torch.device) -> PromptRows:
        """On a device, where pages have so many slots."""
        chunks = list(zip(self.context_lens, self.query_lens, strict=True))
        positions = [position for start, num in chunks for position in range(start, start + num)]
        parents = [parent for _, num in chunks for parent in chain_parents(num)]
        attention = plan_tree_attention(
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            page_table=page_table_tensor(self.page_lists, device),
            parents=upload(torch.tensor(parents, dtype=torch.int32), device),
            page_size=page_size,
            is_chain=[True] * len(self.query_lens),
        )
        rows = torch.tensor([self.token_ids, positions, self.slots], dtype=torch.int64)
        return PromptRows(
            rows=upload(rows, device),
            attention=attention,
            last_rows=upload(torch.tensor(self.last_rows, dtype=torch.int64), device),
            choosers=upload(torch.tensor(self.choosers, dtype=torch.int32), device),
        )


def prompt_numbers(
    items: Sequence[ScheduledRequest], places: Sequence[int | None], *, num_requests: int
) -> PromptNumbers:
    """Lays prompt chunks out.

    Args:
        items: chunks; pages for their rows are allocated.
        places: of each one that ends a prompt, its request's row in the step; None for the others.
        num_requests: R.
    """
    token_ids: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    choosers = [-1] * num_requests
    for item, place in zip(items, places, strict=True):
        request, start, stop = item.request, item.request.num_computed, item.request.num_computed + item.num_rows
        token_ids += request.token_ids[start:stop]
        slots += request.pages.slots(start, stop)
        if place is not None:
            choosers[place] = len(last_rows)
            last_rows.append(len(token_ids) - 1)
    return PromptNumbers(
        token_ids=token_ids,
        slots=slots,
        query_lens=[item.num_rows for item in items],
        context_lens=[item.request.num_computed for item in items],
        page_lists=[list(item.request.pages.pages) for item in items],
        last_rows=last_rows,
        choosers=choosers,
    )
