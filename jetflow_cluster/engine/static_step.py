"""One step over decoding requests on tensors of fixed sizes: draft, build, verify, accept, commit, without the host.

What changes from step to step is read from inputs and written to outputs; everything else was decided when the step was
made. So the same sequence of launches serves every batch that fits its bucket, and a device may record it.
Ranks that share a model run the same step on what rank 0 was given, and follow its guesses and its choice.
Rows and requests that a batch lacks write to the scratch page, and nobody reads what they compute.
"""

from __future__ import annotations

import torch

from jetflow_cluster.config import MAX_WIDTH
from jetflow_cluster.engine.bucket import TREE_COLUMNS, Bucket, input_fields, output_fields
from jetflow_cluster.engine.device_builder import value_table
from jetflow_cluster.engine.device_calibration import calibrate_on_device
from jetflow_cluster.engine.device_lookup import mix_on_device, shared_on_device
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.prompt_rows import PromptRows
from jetflow_cluster.engine.staging import Staging
from jetflow_cluster.engine.step_scratch import StepScratch
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.tree.build import MIN_SCORE
from jetflow_cluster.tree.device_tables import DraftNoise, device_tables
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH
from jetflow_kernels.accept_tree import SamplingTable, VerifiedTrees, WalkBuffers, accept_tree, commit_slots
from jetflow_kernels.build_tree import Candidates, RowLayout, TreeBuffers, TreeLimits, build_tree, lay_out_rows
from jetflow_kernels.commit_kv import commit_kv
from jetflow_kernels.tree_attention import HeadLayout, block_attention, tree_rows_attention
from jetflow_kernels.tree_attention.metadata import ALL, CHAIN


class StaticStep:
    """The launches of one bucket.

    Inputs by name: ``anchor_ids``, the last committed tokens; ``context_lens``, tokens in the cache (0 for requests
    that are not there); ``limits`` and ``budget``, as `TreeLimits` has them, where most nodes are 0 for such requests;
    ``has_context``, 1 for requests whose draft context is to be kept; ``gap_pages``, pages before it; ``page_table``,
    the scratch page where there is no page; ``numbers``, ``factors`` and what is changed and barred, as `SamplingTable`
    has them. Guesses from requests' own texts as `mix_on_device` takes them; ``maps`` and ``kinds`` as
    `calibrate_on_device` does; ``row_costs``, as `TreeLimits` has them.

    Outputs by name: ``nodes``, ``token_ids`` and ``lengths``, as `WalkBuffers` has them; ``counts``, the trees' nodes;
    ``num_shared``, as `shared_on_device` gives it;
    ``tree_token_ids``, ``tree_parents``, ``tree_depths`` and ``tree_scores``, as `TreeBuffers` has them.
    """

    def __init__(
        self, bucket: Bucket, target: TargetRunner, drafter: HeadDrafter | None, scratch: StepScratch, tp: TpGroup
    ):
        if bucket.has_trees and drafter is None:
            raise ValueError(f"{bucket}: trees need a draft head")
        self.bucket, self.target, self.drafter, self._tp = bucket, target, drafter, tp
        self._page_size, self._pad_slot = target.page_size, target.scratch_slot
        self._vocab_size = target.model.config.vocab_size
        #: Deepest guess of the head.
        self._head_depth = drafter.max_depth if drafter is not None and bucket.has_head else 0
        self._depth = max(1, self._head_depth, MAX_LOOKUP_DEPTH if bucket.has_lookup else 0)
        self._width = min(MAX_WIDTH, self._vocab_size) if bucket.has_head else 1
        self._num_levels = self._depth + 1 if bucket.has_trees else 1
        self.inputs = Staging(input_fields(bucket), target.device)
        self.outputs = Staging(output_fields(bucket, self._num_levels), target.device)
        #: Fused hidden vectors of the roots where there are no trees, ``[num_requests, hidden_size]``, in the order of
        #: the requests.
        self.fused = drafter.empty_fused(bucket.num_requests if not bucket.has_trees else 0) if drafter else None
        #: As the last step left them.
        self.trees = self._tree_buffers()
        #: Of the last step's rows, then of its prompts' ends, where they are kept.
        self.logits = scratch.logits[: bucket.num_rows + bucket.num_requests] if bucket.keeps_logits else None
        self._prepare_rows()
        self._prepare_walk(scratch)
        self._no_candidates = self._blank_candidates()
        if bucket.has_head:
            self._prepare_blocks()

    def _tree_buffers(self) -> TreeBuffers:
        """Whose trees are where the host reads them."""
        bucket, drafter = self.bucket, self.drafter
        has_sidecar = drafter is not None and drafter.sidecar is not None and self._head_depth > 1
        self._num_parents = self._width if has_sidecar or bucket.has_lookup else 1
        trees = TreeBuffers.allocate(
            num_requests=bucket.num_requests,
            num_nodes=bucket.num_nodes,
            num_rows=bucket.num_rows,
            num_depths=self._depth,
            width=self._width,
            is_conditional=self._num_parents > 1,
            device=self.target.device,
        )
        read = {name: self.outputs.device[f"tree_{name}"] for name in TREE_COLUMNS if bucket.has_trees}
        return TreeBuffers(**vars(trees) | read)

    def _blank_candidates(self) -> Candidates:
        """For trees of roots, and for those to which guesses from elsewhere are added."""
        requests, depth, width, device = self.bucket.num_requests, self._depth, self._width, self.target.device
        return Candidates(
            ids=torch.zeros(requests, depth, width, dtype=torch.int64, device=device),
            scores=torch.full((requests, depth, self._num_parents, width), MIN_SCORE, dtype=torch.int32, device=device),
        )

    def _prepare_rows(self) -> None:
        """Tensors of the verifying pass."""
        bucket, inputs = self.bucket, self.inputs.device
        heads = _head_layout(self.target.kv, self.target.model.num_local_heads)
        self._tile_rows = heads.tile_rows(bucket.num_nodes)
        self._layout = RowLayout.allocate(
            num_requests=bucket.num_requests,
            num_nodes=bucket.num_nodes,
            num_rows=bucket.num_rows,
            tile_rows=self._tile_rows,
            device=self.target.device,
        )
        self._attention = tree_rows_attention(
            heads,
            num_nodes=bucket.num_nodes,
            page_table=inputs["page_table"],
            page_size=self._page_size,
            tiles=self._layout.tiles,
            requests=self._layout.requests,
            ancestor_bits=self._layout.ancestor_bits,
        )

    def _prepare_walk(self, scratch: StepScratch) -> None:
        """Tensors of the walk and of what it moves."""
        bucket, device = self.bucket, self.target.device
        is_processed = bucket.has_filters or bucket.has_changes
        walk = WalkBuffers.allocate(
            num_requests=bucket.num_requests,
            num_levels=self._num_levels,
            # Ends of prompts choose as well.
            num_rows=bucket.num_rows + bucket.num_requests,
            vocab_size=self._vocab_size,
            is_processed=False,
            device=device,
        )
        read = {name: self.outputs.device[name] for name in ("nodes", "token_ids", "lengths")}
        if is_processed:
            read["scores"], read["shortlist"] = scratch.scores[:, : bucket.num_requests]
        self._walk = WalkBuffers(**vars(walk) | read)
        self._table = self._sampling_table() if bucket.has_noise or bucket.has_changes else None
        slots = (bucket.num_requests, self._num_levels)
        self._source_slots, self._target_slots = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._levels = torch.arange(self._num_levels, device=device)

    def run(self, prompts: PromptRows | None = None) -> torch.Tensor | None:
        """All launches, in order. Reads and writes nothing but tensors on the device, without prompts of fixed sizes.

        Returns:
            taps of the prompts' rows, or None where there are none.
        """
        with torch.inference_mode():
            self._tp.broadcast(self.inputs.buffer)
            self._build(self._draft())
            logits, taps = self._verify(prompts)
            if self.logits is not None:
                self.logits[: logits.shape[0]].copy_(logits)
            self._accept(logits, prompts)
            self._tp.broadcast(self.outputs.buffer)
            self._commit(taps)
        return None if taps is None or prompts is None else taps[self.bucket.num_rows :]

    def _sampling_table(self) -> SamplingTable:
        inputs, requests = self.inputs.device, self.bucket.num_requests
        table = SamplingTable.allocate(
            num_requests=requests,
            num_changed=0,
            num_barred=0,
            has_changes=self.bucket.has_changes,
            has_filters=self.bucket.has_filters,
            device=self.target.device,
        )
        return SamplingTable(**vars(table) | {name: inputs[name] for name in vars(table) if name in inputs})

    def _prepare_blocks(self) -> None:
        """Tensors of the head's input that never change, or are written in place."""
        assert self.drafter is not None
        config, device = self.drafter.head.config, self.target.device
        requests, num_slots = self.bucket.num_requests, config.block_size
        self._block_ids = torch.full((requests, num_slots), config.mask_token_id, dtype=torch.int64, device=device)
        self._block_steps = torch.arange(num_slots, device=device)
        table = self.inputs.device["page_table"]
        #: Pages of the draft contexts.
        self._context_table = torch.zeros_like(table) if self.bucket.has_gaps else table
        self._pages = torch.arange(table.shape[1], device=device)
        self._block_attention = block_attention(
            _head_layout(self.drafter.kv, self.drafter.head.num_local_heads),
            num_requests=requests,
            rows_per_request=num_slots,
            page_table=self._context_table,
            page_size=self._page_size,
            mode=CHAIN if config.causal else ALL,
        )

    def _slots(self, positions: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        """Slots of positions int64 ``[R, n]``; the scratch slot where nothing is kept."""
        pages = self.inputs.device["page_table"].long().gather(1, positions // self._page_size)
        return torch.where(is_kept, pages * self._page_size + positions % self._page_size, self._pad_slot)

    def _draft(self) -> Candidates:
        """Whatever guesses there are, calibrated where they have a price."""
        bucket, inputs = self.bucket, self.inputs.device
        if not bucket.has_trees:
            return self._no_candidates
        found = self._guess() if bucket.has_head else self._no_candidates
        ids, scores = found.ids, found.scores
        if bucket.has_lookup:
            guesses = {name: inputs[name] for name in ("guess_ids", "num_guesses", "num_own")}
            guesses["widths"] = inputs["limits"][:, 2]
            self.outputs.device["num_shared"].copy_(shared_on_device(ids, **guesses))
            ids, scores = mix_on_device(ids, scores, weights=inputs["guess_weights"], **guesses)
        if bucket.has_price:
            scores = calibrate_on_device(scores, inputs["maps"], inputs["kinds"])
        # Logits are the same on all ranks, but what is made of them may differ in the last bit from chip to chip.
        return Candidates(ids=self._tp.broadcast(ids.contiguous()), scores=self._tp.broadcast(scores.contiguous()))

    def _guess(self) -> Candidates:
        """The head's pass over anchors and masks."""
        assert self.drafter is not None
        inputs, drafter = self.inputs.device, self.drafter
        self._block_ids[:, 0].copy_(inputs["anchor_ids"])
        context = inputs["context_lens"]
        self._block_attention.metadata.requests[:, 2].copy_(self._draft_lens())
        positions = context.long()[:, None] + self._block_steps
        slots = self._slots(positions, (inputs["has_context"] > 0)[:, None])
        batch = ForwardBatch(
            token_ids=self._block_ids.view(-1),
            positions=positions.flatten(),
            slot_mapping=slots.flatten(),
            attention=self._block_attention,
        )
        embeds = self.target.model.embed(batch.token_ids).to(drafter.head.dtype)
        hidden = drafter.head.forward(embeds, batch, drafter.kv).to(self.target.model.dtype)
        rows = hidden.view(*self._block_ids.shape, -1)[:, 1:].flatten(0, 1)
        logits = self.target.model.compute_logits(rows).view(self.bucket.num_requests, self._head_depth, -1)
        noise = None
        if self.bucket.has_noise:
            noise = DraftNoise(
                temperatures=inputs["factors"][:, 0], seeds=inputs["numbers"][:, 0], anchor_positions=context.long()
            )
        sidecar = drafter.sidecar
        ids, scores = device_tables(
            logits,
            self._width,
            noise,
            sidecar,
            sidecar.config.sharpness if sidecar is not None else 1.0,
        )
        return Candidates(ids=ids.contiguous(), scores=scores.contiguous())

    def _draft_lens(self) -> torch.Tensor:
        """Tokens of the draft contexts int32 ``[R]``; their pages are put to the front of their table."""
        inputs = self.inputs.device
        if not self.bucket.has_gaps:
            return inputs["context_lens"]
        gaps = inputs["gap_pages"]
        pages = (self._pages + gaps[:, None]).clamp_max(len(self._pages) - 1)
        self._context_table.copy_(inputs["page_table"].gather(1, pages))
        return inputs["context_lens"] - gaps * self._page_size

    def _build(self, candidates: Candidates) -> None:
        inputs = self.inputs.device
        has_price = self.bucket.has_price
        limits = TreeLimits(
            anchor_ids=inputs["anchor_ids"],
            requests=inputs["limits"],
            budget=inputs["budget"],
            cost=inputs["row_costs"] if has_price else None,
            value_table=value_table(self.target.device) if has_price else None,
        )
        build_tree(candidates, limits, self.trees)
        self.outputs.device["counts"].copy_(self.trees.counts)
        lay_out_rows(
            self.trees,
            self._layout,
            context_lens=inputs["context_lens"],
            page_table=inputs["page_table"],
            page_size=self._page_size,
            pad_slot=self._pad_slot,
            tile_rows=self._tile_rows,
        )

    def _verify(self, prompts: PromptRows | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch = ForwardBatch(
            token_ids=self._layout.token_ids,
            positions=self._layout.positions,
            slot_mapping=self._layout.slot_mapping,
            attention=self._attention,
        )
        batch = batch if prompts is None else prompts.behind(batch)
        reads_taps = self.drafter is not None and (self.bucket.has_trees or self.bucket.has_taps)
        tap_ids = self.drafter.tap_layer_ids if self.drafter is not None and reads_taps else ()
        hidden, taps = self.target.model.forward(batch, self.target.kv, tap_ids)
        hidden = hidden if prompts is None else prompts.choosing(hidden, self.bucket.num_rows)
        return self.target.model.compute_logits(hidden), taps

    def _accept(self, logits: torch.Tensor, prompts: PromptRows | None) -> None:
        trees, counts, first_rows = self.trees, self.trees.counts, self.trees.row_start
        if prompts is not None:
            counts, first_rows = prompts.roots(counts, first_rows, self.bucket.num_rows)
        verified = VerifiedTrees(
            token_ids=trees.token_ids,
            parents=trees.parents,
            counts=counts,
            first_rows=first_rows,
            logits=logits,
        )
        accept_tree(verified, self._table, self._walk)

    def _commit(self, taps: torch.Tensor | None) -> None:
        """Moves the paths' K and V behind the contexts, and their taps into the draft context."""
        inputs = self.inputs.device
        if not self.bucket.has_trees:
            if taps is not None:
                assert self.drafter is not None
                assert self.fused is not None
                # Requests that end a prompt have no row here, so a root's row is not its request's place.
                rows = self.trees.row_start[:-1].long().clamp_max(self.bucket.num_rows - 1)
                self.fused.copy_(self.drafter.fuse(taps.index_select(0, rows)))
            return
        assert taps is not None
        assert self.drafter is not None
        commit_slots(
            self._walk,
            self._source_slots,
            self._target_slots,
            context_lens=inputs["context_lens"],
            page_table=inputs["page_table"],
            page_size=self._page_size,
        )
        commit_kv(self.target.kv, self._source_slots, self._target_slots)
        is_kept = (self._levels < self._walk.lengths[:, None]) & (inputs["has_context"] > 0)[:, None]
        nodes = torch.where(is_kept, self._walk.nodes, 0) + self.trees.row_start[:-1, None]
        rows = torch.where(is_kept, nodes, 0).flatten()
        positions = inputs["context_lens"].long()[:, None] + self._levels
        slots = self._slots(torch.where(is_kept, positions, 0), is_kept)
        self.drafter.head.project_context(
            self.drafter.fuse(taps.index_select(0, rows)), positions.flatten(), slots.flatten(), self.drafter.kv
        )


def _head_layout(kv: torch.Tensor, num_heads: int) -> HeadLayout:
    return HeadLayout(dtype=kv.dtype, num_heads=num_heads, num_kv_heads=kv.shape[4], head_dim=kv.shape[5])
