"""Runs the draft head: one pass over a block of masks per request guesses all depths at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jetflow_cluster.cache.kv_cache import allocate_kv, kv_dtype
from jetflow_cluster.config import MAX_WIDTH
from jetflow_cluster.engine.batch import chain_parents, page_table_tensor
from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.models.draft_head import DraftHead
from jetflow_cluster.models.registry import TargetModel
from jetflow_cluster.models.sidecar import SideCar
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.coupled import DraftSampling, candidate_tables
from jetflow_kernels.tree_attention import plan_tree_attention


class HeadDrafter:
    """A draft head beside its target; its context pages mirror the target's page ids."""

    def __init__(
        self,
        head: DraftHead,
        sidecar: SideCar | None,
        target: TargetModel,
        *,
        num_pages: int,
        page_size: int,
    ):
        config = head.config
        self.head = head
        self.sidecar = sidecar
        self.tap_layer_ids = config.target_layer_ids
        self.max_depth = config.block_size - 1
        self.num_scratch_rows = config.block_size
        self._target = target
        self._page_size = page_size
        self._device = target.device
        self.kv = allocate_kv(
            num_layers=config.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=head.num_local_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype(head.dtype, target.device),
            device=target.device,
        )

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Fused hidden vectors ``[n, hidden_size]`` of taps ``[n, num_taps * hidden_size]``."""
        return self.head.fuse(taps.to(self.head.dtype))

    def absorb(self, requests: Sequence[Request]) -> None:
        """Projects all pending fused vectors of these requests into their draft pages, in one pass."""
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
        if not fused:
            return
        self.head.project_context(
            torch.cat(fused) if len(fused) > 1 else fused[0],
            torch.tensor(positions, dtype=torch.int64, device=self._device),
            torch.tensor(slots, dtype=torch.int64, device=self._device),
            self.kv,
        )
        for request in requests:
            request.draft_len += sum(part.shape[0] for part in request.pending_fused)
            request.pending_fused.clear()

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        """Tables for the items that may speculate; None for the others."""
        chosen = [i for i, item in enumerate(plan.items) if item.max_tree_nodes > 1]
        tables: list[CandidateTable | None] = [None] * len(plan.items)
        if not chosen:
            return tables
        items = [plan.items[i] for i in chosen]
        self.absorb([item.request for item in items])
        depth = max(item.max_depth for item in items)
        # A causal block may be cut: no slot sees a later one.
        num_slots = depth + 1 if self.head.config.causal else self.head.config.block_size
        logits = self._block_logits([item.request for item in items], num_slots)[:, :depth]
        width = min(MAX_WIDTH, max(item.max_tree_nodes for item in items) - 1)
        made = candidate_tables(
            logits,
            width=width,
            anchor_ids=[item.request.token_ids[-1] for item in items],
            sampling=[self._sampling(item) for item in items],
            sidecar=self.sidecar.correction if self.sidecar is not None else None,
            scales=self.sidecar.config.scales or None if self.sidecar is not None else None,
        )
        for i, table in zip(chosen, made, strict=True):
            tables[i] = table
        return tables

    @staticmethod
    def _sampling(item: ScheduledRequest) -> DraftSampling | None:
        request = item.request
        if request.params.is_greedy:
            return None
        return DraftSampling(
            temperature=request.params.temperature, seed=request.seed, anchor_position=len(request.token_ids) - 1
        )

    def _block_logits(self, requests: Sequence[Request], num_slots: int) -> torch.Tensor:
        """Logits ``[R, num_slots - 1, vocab_size]`` of the mask slots."""
        masks = [self.head.config.mask_token_id] * (num_slots - 1)
        ids = [i for request in requests for i in (request.token_ids[-1], *masks)]
        positions: list[int] = []
        slots: list[int] = []
        parents: list[int] = []
        for request in requests:
            start = request.draft_len
            positions += range(start, start + num_slots)
            slots += request.pages.slots(start, start + num_slots)
            parents += chain_parents(num_slots)
        device = self._device
        batch = ForwardBatch(
            token_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            attention=plan_tree_attention(
                query_lens=[num_slots] * len(requests),
                context_lens=[request.draft_len for request in requests],
                page_table=page_table_tensor([request.pages.pages for request in requests], device),
                parents=torch.tensor(parents, dtype=torch.int32, device=device),
                page_size=self._page_size,
                bidirectional=not self.head.config.causal,
                is_chain=[True] * len(requests),
            ),
        )
        embeds = self._target.embed(batch.token_ids).to(self.head.dtype)
        hidden = self.head.forward(embeds, batch, self.kv).to(self._target.dtype)
        guesses = hidden.view(len(requests), num_slots, -1)[:, 1:].flatten(0, 1)
        return self._target.compute_logits(guesses).view(len(requests), num_slots - 1, -1)
