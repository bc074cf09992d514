"""Runs steps without prompt chunks from recorded launches, and steps with them by the same launches, one at a time;
what neither serves is computed by the engine as it is.

Steps are recorded per bucket, when one is first needed. What does the recording is the only part that knows CUDA;
where there is none the same launches are executed instead of replayed. Where several ranks share the model, this is
rank 0, which announces each step to the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from jetflow_cluster.engine.batch import wants_prompt_logprobs
from jetflow_cluster.engine.bucket import BARRED, CHANGED, NODES, REQUESTS, ROWS, TREE_COLUMNS, Bucket, at_least
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.lookup import ContextLookup
from jetflow_cluster.engine.prompt_rows import PromptNumbers, prompt_numbers
from jetflow_cluster.engine.protocols import BudgetPolicy, Compute, ScheduledRequest, StepOutcome, StepPlan
from jetflow_cluster.engine.recorded_steps import RecordedStep, RecordedSteps
from jetflow_cluster.engine.recording import Recorder
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.static_parts import StaticPart, note_guesses
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.layers.sampler import token_logprobs
from jetflow_cluster.layers.sampling_row import has_penalties
from jetflow_cluster.layers.walk_table import has_filters
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree

#: Entered around a step of a bucket, beside prompts or without: tells the other ranks to do the same.
Announce = Callable[[Bucket, PromptNumbers | None], AbstractContextManager[object]]


def nobody_else(bucket: Bucket, prompts: PromptNumbers | None) -> AbstractContextManager[object]:
    """`Announce` where there is no other rank."""
    return nullcontext()


class GraphRunner:
    """Static steps by bucket, and what the host does around them.

    Args:
        steps: of this rank.
        target: with a scratch page.
        drafter: with a scratch page; None does not speculate.
        compute_eagerly: computes the steps that no bucket serves.
        max_len: longest prompt plus output.
        announce: see `Announce`.
        budget: the policy in force, asked before each step.
        lookup: the source of guesses beside the drafter, asked before each step.
    """

    def __init__(
        self,
        steps: RecordedSteps,
        target: TargetRunner,
        drafter: HeadDrafter | None,
        compute_eagerly: Compute,
        *,
        max_len: int,
        announce: Announce,
        budget: Callable[[], BudgetPolicy],
        lookup: Callable[[], ContextLookup | None],
    ):
        self.steps, self.target, self.drafter = steps, target, drafter
        #: Told the name of each stage, as `Engine.on_stage` is.
        self.on_stage: Callable[[str], None] = lambda stage: None
        #: Steps that were replayed, and those that ran on static buffers beside prompts.
        self.num_static_steps = self.num_mixed_steps = 0
        self._compute_eagerly, self._announce = compute_eagerly, announce
        self._budget, self._lookup = budget, lookup
        scratch_rows = max(NODES[-1], drafter.num_scratch_rows if drafter is not None else 1)
        self._num_pages = -(-(max_len + scratch_rows) // target.page_size)

    def compute(self, plan: StepPlan, meanwhile: Callable[[], None]) -> StepOutcome:
        """One step; from a bucket where one serves it. See `Compute`."""
        if not self.serves(plan):
            return self._compute_eagerly(plan, meanwhile)
        # The policy knows the step by the plan's own items.
        shallow = replace(plan, items=tuple(map(_before_context, plan.items))) if plan.speculates else plan
        lookup = self._lookup()
        looks = lookup.look(shallow) if lookup is not None and plan.speculates else [None] * len(plan.items)
        parts = [StaticPart(item, look) for item, look in zip(shallow.items, looks, strict=True)]
        plan = self._budget().price_rows(plan, [part.source for part in parts])
        # Who is in the midst of a prompt chooses nothing.
        parts = [part for part in parts if part.item.is_last]
        return self._compute_static(plan, parts, self.bucket_for(plan, parts), meanwhile)

    def serves(self, plan: StepPlan) -> bool:
        """False where a plan asks for what static steps do not do."""
        items = plan.items
        if not all(_is_static(item) for item in items) or len(items) > REQUESTS[-1]:
            return False
        if not any(item.is_last for item in items):
            # Nothing is chosen, so nothing is waited for.
            return False
        decoding = [item for item in items if _decodes(item)]
        growing = [item for item in decoding if item.max_tree_nodes > 1]
        if not growing:
            return True
        if self.drafter is None or not all(_has_context(item) for item in decoding):
            return False
        if max(item.max_tree_nodes for item in growing) > NODES[-1] or plan.tree_budget > ROWS[-1]:
            return False
        # Trees with a price and trees without one are built apart.
        is_priced = self._budget().maps is not None and any(item.is_priced for item in growing)
        return not (is_priced and any(item.is_forced for item in decoding))

    def bucket_for(self, plan: StepPlan, parts: Sequence[StaticPart]) -> Bucket:
        """The smallest bucket that holds the requests that choose a token in a plan that is served."""
        nodes = at_least(NODES, max(part.num_nodes for part in parts))
        requests = at_least(REQUESTS, len(parts))
        rows = requests if nodes == 1 else at_least(ROWS, max(plan.tree_budget, len(parts)))
        params = [part.item.request.params for part in parts]
        wants_taps = self.drafter is not None and any(item.keeps_context for item in plan.items)
        return Bucket(
            num_requests=requests,
            num_nodes=nodes,
            num_rows=rows,
            num_pages=self._num_pages,
            has_noise=any(not p.is_greedy for p in params),
            has_filters=any(has_filters(p) for p in params),
            has_taps=nodes > 1 or wants_taps,
            has_head=any(part.asks_head for part in parts),
            has_gaps=any(part.gap for part in parts),
            has_lookup=nodes > 1 and any(part.look is not None and part.num_nodes > 1 for part in parts),
            has_price=nodes > 1 and plan.row_costs is not None,
            keeps_logits=any(p.logprobs is not None for p in params),
            **_changes(parts),
        )

    def _compute_static(
        self, plan: StepPlan, parts: Sequence[StaticPart], bucket: Bucket, meanwhile: Callable[[], None]
    ) -> StepOutcome:
        chunks = [item for item in plan.items if not _decodes(item)]
        self.on_stage("draft")
        if bucket.has_trees and self.drafter is not None:
            # Behind a prompt: what waits is projected now, and from here on the steps do it.
            self.drafter.absorb([item.request for item in plan.items if item.keeps_context and _decodes(item)])
        prompts = self._prompts(chunks, parts, bucket)
        failure: Exception | None = None
        with self._announce(bucket, prompts):
            began_s = time.perf_counter()
            recorded = self.steps.get(bucket, is_replayed=prompts is None)
            held_up_s = time.perf_counter() - began_s
            try:
                self._write(recorded, plan, parts, budget=max(plan.tree_budget - len(chunks), len(parts)))
            except Exception as error:
                # Other ranks are in the step already: it is done for nobody.
                failure = error
                recorded.inputs.clear()
            self.on_stage("verify")
            taps = recorded.run(prompts)
        if failure is not None:
            raise failure
        self.num_static_steps += prompts is None
        self.num_mixed_steps += prompts is not None
        step = recorded.step
        step.outputs.begin_download()
        try:
            meanwhile()
        finally:
            # The step's one wait for the device.
            self.on_stage("accept")
            step.outputs.wait()
        self._keep_prompts(chunks, taps)
        out = step.outputs.host
        lengths, nodes, tokens = (out[name].tolist() for name in ("lengths", "nodes", "token_ids"))
        waiting = self._waiting_fused(step, parts)
        trees = _trees(step, parts)
        if bucket.has_lookup:
            note_guesses(parts, out["num_shared"].tolist())
        paths: dict[int, AcceptedPath] = {}
        for i, part in enumerate(parts):
            request = part.item.request
            paths[request.arrival] = AcceptedPath(nodes=nodes[i][: lengths[i]], token_ids=tokens[i][: lengths[i]])
            if not part.is_prompt:
                self._note_context(part.item, lengths[i], waiting[i])
        _report_logprobs(step, parts, paths)
        self.on_stage("commit")
        arrivals = [item.request.arrival for item in plan.items]
        roots = [DraftTree.root_only(item.request.token_ids[-1]) for item in plan.items]
        return StepOutcome(
            trees=[trees.get(arrival, root) for arrival, root in zip(arrivals, roots, strict=True)],
            paths=[paths.get(arrival) for arrival in arrivals],
            held_up_s=held_up_s,
        )

    @staticmethod
    def _prompts(
        chunks: Sequence[ScheduledRequest], parts: Sequence[StaticPart], bucket: Bucket
    ) -> PromptNumbers | None:
        """What is computed beside the step; None where that is nothing."""
        if not chunks:
            return None
        places = {part.item.request.arrival: i for i, part in enumerate(parts)}
        return prompt_numbers(
            chunks, [places.get(item.request.arrival) for item in chunks], num_requests=bucket.num_requests
        )

    def _write(self, recorded: RecordedStep, plan: StepPlan, parts: Sequence[StaticPart], *, budget: int) -> None:
        """Queues the step's inputs."""
        recorded.inputs.write(
            plan,
            parts,
            head_depth=self._head_depth(parts),
            budget=min(recorded.step.bucket.num_rows, budget),
            maps=self._budget().maps,
        )
        recorded.step.inputs.upload()

    def _keep_prompts(self, chunks: Sequence[ScheduledRequest], taps: torch.Tensor | None) -> None:
        """Fused vectors of the prompts whose draft context goes on; they wait until somebody drafts."""
        if taps is None or self.drafter is None:
            return
        for item, part in zip(chunks, self.drafter.fuse(taps).split([c.num_rows for c in chunks]), strict=True):
            if item.keeps_context:
                kept = part[item.request.keep_context(item.num_rows) :]
                item.request.pending_fused += [kept] if len(kept) else []

    def _waiting_fused(self, step: StaticStep, parts: Sequence[StaticPart]) -> list[torch.Tensor | None]:
        """Of each request that decodes without trees and keeps its draft context the fused vector ``[1, hidden_size]``
        of its token. The next step overwrites the step's own tensor."""
        found: list[torch.Tensor | None] = [None] * len(parts)
        if step.bucket.has_trees or step.fused is None:
            return found
        keeping = [i for i, part in enumerate(parts) if part.item.keeps_context]
        # One copy for all, where it does not hold more than twice what is kept.
        copied = step.fused.clone() if 2 * len(keeping) >= len(step.fused) else None
        for i in keeping:
            found[i] = copied[i : i + 1] if copied is not None else step.fused[i : i + 1].clone()
        return found

    def _note_context(self, item: ScheduledRequest, num_kept: int, fused: torch.Tensor | None) -> None:
        """What became of the draft context of a request that decodes: without trees its `fused` vector ``[1,
        hidden_size]`` waits, with them the step has absorbed those of its path."""
        if self.drafter is None or not item.keeps_context:
            return
        request = item.request
        if not request.has_draft_context and fused is None:
            request.keep_context(num_kept)
        elif fused is None:
            request.draft_len = request.fused_len = request.num_computed + num_kept
        elif not request.keep_context(1):
            request.pending_fused.append(fused)

    def _head_depth(self, parts: Sequence[StaticPart]) -> int:
        """Guesses of the head that count, as deep as the deepest request wants them."""
        most = self.drafter.max_depth if self.drafter is not None else 0
        return min(most, max((part.item.head_depth for part in parts if part.asks_head), default=0))


def serve_from_graphs(
    engine: Engine,
    *,
    max_len: int,
    recorder: Recorder,
    tp: TpGroup | None = None,
    announce: Announce = nobody_else,
) -> GraphRunner:
    """Lets an engine's steps without prompt chunks run from recorded launches.

    Args:
        engine: whose target and draft head have a scratch page.
        max_len: longest prompt plus output.
        recorder: of its device.
        tp: the ranks that share target and head, of which this process is rank 0; None is this process alone.
        announce: tells the others of each step.

    Raises:
        ValueError: the engine's drafter is no draft head in this process.
    """
    drafter = engine.drafter
    if drafter is not None and not isinstance(drafter, HeadDrafter):
        raise ValueError(f"{type(drafter).__name__}: only a draft head in this process drafts within a recorded step")
    steps = RecordedSteps(
        engine.target,
        drafter,
        max_requests=engine.scheduler.max_requests,
        max_rows=engine.scheduler.max_rows,
        recorder=recorder,
        tp=tp or TpGroup.single(),
    )
    runner = GraphRunner(
        steps,
        engine.target,
        drafter,
        engine.compute_eagerly,
        max_len=max_len,
        announce=announce,
        budget=lambda: engine.scheduler.budget,
        lookup=lambda: engine.lookup,
    )
    if drafter is not None:
        drafter.is_full_width = True
    runner.on_stage = lambda stage: engine.on_stage(stage)
    engine.compute = runner.compute
    return runner


def _report_logprobs(step: StaticStep, parts: Sequence[StaticPart], paths: Mapping[int, AcceptedPath]) -> None:
    """Appends to requests what they asked for of the tokens that were chosen."""
    if step.logits is None:
        return
    counts = step.outputs.host["counts"].tolist()
    first_row, end_row = 0, step.bucket.num_rows
    for part, count in zip(parts, counts, strict=False):
        request, path = part.item.request, paths[part.item.request.arrival]
        # Ends of prompts have the rows behind those of all trees.
        rows = [end_row] if part.is_prompt else [first_row + node for node in path.nodes]
        first_row, end_row = first_row + count, end_row + part.is_prompt
        if request.params.logprobs is not None:
            request.logprobs += token_logprobs(step.logits[rows], path.token_ids, request.params.logprobs)


def _trees(step: StaticStep, parts: Sequence[StaticPart]) -> dict[int, DraftTree]:
    """The trees of a step, as its outputs have them, by the arrival of requests that decode."""
    if not step.bucket.has_trees:
        return {}
    host = {name: step.outputs.host[f"tree_{name}"].numpy() for name in TREE_COLUMNS}
    counts = step.outputs.host["counts"].tolist()
    return {
        part.item.request.arrival: DraftTree(**{name: column[i, : counts[i]].tolist() for name, column in host.items()})
        for i, part in enumerate(parts)
        if not part.is_prompt
    }


def _decodes(item: ScheduledRequest) -> bool:
    """A single token or a tree; otherwise a prompt chunk."""
    return item.num_rows == 1 and item.is_last


def _is_static(item: ScheduledRequest) -> bool:
    """Of a request that asks for nothing that the host must compute, and for no more than there is room for."""
    if wants_prompt_logprobs(item):
        return False
    return not item.is_last or (_num_changed(item.request) <= CHANGED[-1] and _num_barred(item.request) <= BARRED[-1])


def _num_changed(request: Request) -> int:
    """Most tokens with a penalty or a bias."""
    counted = len(request.token_ids) if has_penalties(request.params) else 0
    return counted + len(request.params.logit_bias)


def _num_barred(request: Request) -> int:
    return len(request.suppressed_ids) if request.params.min_tokens > request.num_output else 0


def _changes(parts: Sequence[StaticPart]) -> dict[str, int]:
    """Room for what is changed and barred; none where nobody asks for either."""
    requests = [part.item.request for part in parts]
    changed, barred = max(map(_num_changed, requests)), max(map(_num_barred, requests))
    if not changed and not barred:
        return {}
    return {"num_changed": at_least(CHANGED, changed), "num_barred": at_least(BARRED, barred)}


def _has_context(item: ScheduledRequest) -> bool:
    """A draft context that goes on is there up to the anchor, or begins anew further on."""
    return not item.keeps_context or item.request.has_draft_context or item.request.num_unkept > 0


def _before_context(item: ScheduledRequest) -> ScheduledRequest:
    """So shallow that no path reaches a draft context that begins anew."""
    if not _decodes(item) or not item.keeps_context or item.request.has_draft_context:
        return item
    return replace(item, max_depth=min(item.max_depth, item.request.num_unkept - 1))
