"""Runs the draft head: one pass over a block of masks per request guesses all depths at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jetflow_cluster.cache.kv_cache import allocate_kv, kv_dtype
from jetflow_cluster.config import MAX_WIDTH
from jetflow_cluster.engine.batch import chain_parents, page_table_tensor
from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.models.draft_head import DraftHead, DraftHeadConfig
from jetflow_cluster.models.sidecar import SideCar
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.tree.build import CandidateTable, cut_table
from jetflow_cluster.tree.coupled import DraftSampling, candidate_tables
from jetflow_kernels.tree_attention import plan_tree_attention
from jetflow_kernels.upload import upload
from jetflow_kernels.warmup import launch_every_kernel


@dataclass(frozen=True, kw_only=True)
class ContextRows:
    """Committed tokens on their way into the draft context."""

    #: ``[N, hidden_size]``.
    fused: torch.Tensor
    positions: list[int]
    slots: list[int]


@dataclass(frozen=True, kw_only=True)
class DraftBlocks:
    """The head's input: for each request its anchor and masks."""

    batch: ForwardBatch
    #: Rows of each request.
    num_slots: int


class HeadDrafter:
    """A draft head beside its target; its context pages mirror the target's page ids."""

    def __init__(
        self,
        head: DraftHead,
        sidecar: SideCar | None,
        target: TargetEnds,
        *,
        num_pages: int,
        page_size: int,
        num_scratch_pages: int = 0,
    ):
        config = head.config
        self.head = head
        self.config = config
        self.sidecar = sidecar
        self.tap_layer_ids = config.target_layer_ids
        self.max_depth = config.block_size - 1
        self.num_scratch_rows = config.block_size
        self.num_block_slots = None if config.causal else config.block_size
        self.epoch = 0
        #: Tables are made as wide as they can be and then cut, so that a tree does not depend on the sizes of others;
        #: recorded steps do the same. Otherwise they are as wide as the widest of a step, which costs less.
        self.is_full_width = False
        self._target = target
        self._page_size = page_size
        self._device = target.device
        self.kv = allocate_kv(
            num_layers=config.num_layers,
            num_pages=num_pages + num_scratch_pages,
            page_size=page_size,
            num_kv_heads=head.num_local_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype(head.dtype, target.device),
            device=target.device,
        )
        launch_every_kernel(self.kv, num_heads=head.num_local_heads, dtype=head.dtype)

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Fused hidden vectors ``[n, hidden_size]`` of taps ``[n, num_taps * hidden_size]``."""
        return self.head.fuse(taps.to(self.head.dtype))

    def absorb(self, requests: Sequence[Request]) -> None:
        """Projects all pending fused vectors of these requests into their draft pages, in one pass."""
        rows = take_pending(requests)
        if rows is not None:
            self.absorb_rows(rows)

    def absorb_rows(self, rows: ContextRows) -> None:
        """Projects context rows into their slots."""
        self.head.project_context(
            rows.fused,
            upload(torch.tensor(rows.positions, dtype=torch.int64), self._device),
            upload(torch.tensor(rows.slots, dtype=torch.int64), self._device),
            self.kv,
            max_position=max(rows.positions, default=None),
        )

    def empty_fused(self, num_rows: int) -> torch.Tensor:
        """Room for fused vectors, ``[num_rows, hidden_size]``."""
        return torch.empty(num_rows, self.head.config.hidden_size, dtype=self.head.dtype, device=self._device)

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        """Tables for the items that may speculate; None for the others."""
        chosen = [i for i, item in enumerate(plan.items) if item.asks_head]
        found: list[CandidateTable | None] = [None] * len(plan.items)
        if not chosen:
            return found
        items = [plan.items[i] for i in chosen]
        self.absorb([item.request for item in items])
        depth = min(self.max_depth, max(item.head_depth for item in items))
        made = self.tables(
            self.blocks([item.request for item in items], depth),
            depth=depth,
            width=MAX_WIDTH if self.is_full_width else max(item.head_width for item in items),
            anchor_ids=[item.request.token_ids[-1] for item in items],
            sampling=[draft_sampling(item) for item in items],
        )
        for i, table in zip(chosen, made, strict=True):
            found[i] = cut_table(table, plan.items[i].head_width) if self.is_full_width else table
        return found

    def tables(
        self,
        blocks: DraftBlocks,
        *,
        depth: int,
        width: int,
        anchor_ids: Sequence[int],
        sampling: Sequence[DraftSampling | None],
    ) -> list[CandidateTable]:
        """One pass of the head over blocks, and what it guesses at the first `depth` depths."""
        return candidate_tables(
            self.block_logits(blocks)[:, :depth],
            width=width,
            anchor_ids=anchor_ids,
            sampling=sampling,
            sidecar=self.sidecar,
            sharpness=self.sidecar.config.sharpness if self.sidecar is not None else 1.0,
        )

    def blocks(self, requests: Sequence[Request], depth: int) -> DraftBlocks:
        """Anchor and masks of each request, as many as guesses of `depth` tokens take."""
        config = self.head.config
        return draft_blocks(requests, config, depth, self._page_size, self._device)

    def block_logits(self, blocks: DraftBlocks) -> torch.Tensor:
        """Logits ``[R, num_slots - 1, vocab_size]`` of the mask slots."""
        embeds = self._target.embed(blocks.batch.token_ids).to(self.head.dtype)
        hidden = self.head.forward(embeds, blocks.batch, self.kv).to(self._target.dtype)
        rows = hidden.view(-1, blocks.num_slots, hidden.shape[-1])
        guesses = rows[:, 1:].flatten(0, 1)
        return self._target.compute_logits(guesses).view(rows.shape[0], blocks.num_slots - 1, -1)


def take_pending(requests: Sequence[Request]) -> ContextRows | None:
    """The fused vectors that wait, counted as absorbed; None when none do."""
    fused: list[torch.Tensor] = []
    positions: list[int] = []
    slots: list[int] = []
    for request in requests:
        count = sum(part.shape[0] for part in request.pending_fused)
        if count:
            start = request.draft_len
            fused += request.pending_fused
            positions += range(start, start + count)
            slots += request.pages.slots(start, start + count)
            request.pending_fused.clear()
            request.draft_len += count
            assert request.draft_len == request.fused_len
    if not fused:
        return None
    return ContextRows(fused=torch.cat(fused) if len(fused) > 1 else fused[0], positions=positions, slots=slots)


def draft_sampling(item: ScheduledRequest) -> DraftSampling | None:
    """What drafting must know of a request that samples; None for a greedy one."""
    request = item.request
    if request.params.is_greedy:
        return None
    return DraftSampling(
        temperature=request.params.temperature, seed=request.seed, anchor_position=len(request.token_ids) - 1
    )


def draft_blocks(
    requests: Sequence[Request], config: DraftHeadConfig, depth: int, page_size: int, device: torch.device
) -> DraftBlocks:
    """Anchor and masks of each request behind its draft context."""
    # A causal block may be cut: no slot sees a later one.
    num_slots = depth + 1 if config.causal else config.block_size
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    parents: list[int] = []
    for request in requests:
        start = request.draft_len
        ids += [request.token_ids[-1]] + [config.mask_token_id] * (num_slots - 1)
        positions += range(start, start + num_slots)
        slots += request.pages.slots(start, start + num_slots)
        parents += chain_parents(num_slots)
    batch = ForwardBatch(
        token_ids=upload(torch.tensor(ids, dtype=torch.int64), device),
        positions=upload(torch.tensor(positions, dtype=torch.int64), device),
        slot_mapping=upload(torch.tensor(slots, dtype=torch.int64), device),
        max_position=max(positions, default=None),
        attention=plan_tree_attention(
            query_lens=[num_slots] * len(requests),
            context_lens=[request.draft_len - request.draft_start for request in requests],
            page_table=page_table_tensor(
                [request.pages.pages[request.draft_start // page_size :] for request in requests], device
            ),
            parents=upload(torch.tensor(parents, dtype=torch.int32), device),
            page_size=page_size,
            bidirectional=not config.causal,
            is_chain=[True] * len(requests),
        ),
    )
    return DraftBlocks(batch=batch, num_slots=num_slots)
