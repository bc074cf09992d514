"""The step: schedule, draft, build, verify, accept, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from jetflow_cluster.cache.page_pool import PagePool
from jetflow_cluster.cache.prefix_cache import PrefixCache
from jetflow_cluster.engine.batch import StepBatch, build_batch
from jetflow_cluster.engine.counters import StepCounters
from jetflow_cluster.engine.device_parts import acceptor_for, tree_builder_for
from jetflow_cluster.engine.guessing import Guessing
from jetflow_cluster.engine.lookup import ContextLookup
from jetflow_cluster.engine.protocols import (
    Acceptor,
    Compute,
    Drafter,
    StepOutcome,
    StepPlan,
    StepRecord,
    TreeBuilder,
    TreeRecord,
)
from jetflow_cluster.engine.reported_logprobs import report_logprobs
from jetflow_cluster.engine.request import Request, RequestStatus
from jetflow_cluster.engine.scheduler import Scheduler
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.engine.told_tree import told_tree
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import EngineStats, FinishReason, RequestDelta
from jetflow_kernels import compilations
from jetflow_kernels.upload import upload
from jetflow_kernels.warmup import launch_tree_kernels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Verified:
    """What the target said about a batch."""

    logits: torch.Tensor | None
    taps: torch.Tensor | None


class Engine:
    """Runs requests through one target and at most one drafter. Not thread-safe: one thread steps and adds."""

    def __init__(
        self,
        target: TargetRunner,
        drafter: Drafter | None,
        scheduler: Scheduler,
        *,
        prefix_cache: PrefixCache | None,
        lookup: ContextLookup | None = None,
        tree_builder: TreeBuilder | None = None,
    ):
        self.target = target
        self.drafter = drafter
        self.scheduler = scheduler
        self.prefix_cache = prefix_cache
        self.lookup = lookup
        self.tree_builder: TreeBuilder = tree_builder or tree_builder_for(target.device)
        self.acceptor: Acceptor = acceptor_for(target.device)
        #: The passes of a step; a `GraphRunner` may stand here.
        self.compute: Compute = self.compute_eagerly
        #: Called behind each step, for tracing.
        self.on_step: Callable[[StepRecord], None] | None = None
        #: Told the name of each stage of a step as it begins, for tracing: schedule, draft, build, verify, accept,
        #: commit. A stage that only queues work on a device ends when it is queued.
        self.on_stage: Callable[[str], None] = lambda stage: None
        #: Called in each step while its passes run; may add and abort requests.
        self.while_computing: Callable[[], None] = lambda: None
        self.requests: dict[str, Request] = {}
        self.num_steps = self.num_finished = self.num_generated_tokens = 0
        self.counters = StepCounters()
        self._guessing = Guessing()
        self._early: list[RequestDelta] = []
        #: Those whose passes run.
        self._in_flight: frozenset[Request] = frozenset()
        #: Tells the budget policy of the last step.
        self._teach: Callable[[], None] = lambda: None
        self._draft_epoch = drafter.epoch if drafter is not None else 0
        model = target.model
        launch_tree_kernels(target.device, vocab_size=model.config.vocab_size, dtype=model.dtype)

    @property
    def pool(self) -> PagePool:
        """The pages that target and draft context share."""
        return self.scheduler.pool

    @property
    def has_work(self) -> bool:
        """True while a step is computed, or would do something."""
        return bool(self.requests or self._early or self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a request; the next step tells of one that its prior output tokens ended."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id = {request.request_id!r}: already in use")
        if request.finish_reason is not None:
            self._early.append(self._delta(request, [], "", 0))
            return
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_id: str) -> RequestDelta | None:
        """Ends a request at once; None when it is unknown or has ended. Its pages are free at once too, or behind the
        step that is computing it."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        text = request.finish(FinishReason.ABORT)
        del self.requests[request_id]
        if request not in self._in_flight:
            self._let_go(request)
        return self._delta(request, [], text, 0)

    @torch.inference_mode()
    def step(self) -> list[RequestDelta]:
        """One step over the batch; the deltas of all requests that got tokens or ended.

        An exception ends the requests of the step with reason ``error``, and only those.
        """
        began_s = time.perf_counter()
        deltas, self._early = self._early, []
        self.on_stage("schedule")
        plan = self.scheduler.schedule()
        if not plan.items:
            return deltas
        self._in_flight = frozenset(item.request for item in plan.items)
        try:
            outcome = self.compute(plan, lambda: self._work_ahead(plan))
            deltas += self._commit(plan, outcome)
            self.counters.count(plan, outcome.trees, outcome.paths)
            took_s = time.perf_counter() - began_s - outcome.held_up_s
            self._teach = partial(self.scheduler.budget.observe, plan, outcome.trees, outcome.paths, took_s)
        except Exception as error:
            _log.exception("step %d failed; its %d requests end", self.num_steps, len(plan.items))
            deltas += self._fail(plan, error)
        finally:
            self._in_flight = frozenset()
        self.num_steps += 1
        return deltas

    def _work_ahead(self, plan: StepPlan) -> None:
        """What the host does while a device computes `plan`: whatever belongs to the last step or to the next and does
        not depend on the outcome."""
        teach, self._teach = self._teach, lambda: None
        teach()
        self.while_computing()
        self.scheduler.prepare(plan)

    def compute_eagerly(self, plan: StepPlan, meanwhile: Callable[[], None]) -> StepOutcome:
        """The passes of any step, one launch at a time; see `Compute`."""
        self.on_stage("draft")
        tables = self._draft(plan)
        self.on_stage("build")
        plan, tables = self.scheduler.budget.price(plan, tables)
        trees = self.tree_builder(plan, tables)
        batch = build_batch(plan, trees, self.target.page_size, self.target.device)
        self.on_stage("verify")
        verified = self._verify(plan, batch)
        meanwhile()
        self.on_stage("accept")
        paths = self._accept(plan, trees, batch, verified)
        if all(path is None for path in paths):
            self.target.wait()
        self.on_stage("commit")
        self._commit_kv(plan, paths)
        self._keep_fused(plan, batch, verified, paths)
        for i, (item, path) in enumerate(zip(plan.items, paths, strict=True)):
            report_logprobs(i, item, batch, verified.logits, path)
        return StepOutcome(trees=trees, paths=paths)

    def pages_with_draft_context(self) -> list[int]:
        """Pages whose draft context somebody may still read: those of running requests, and cached ones."""
        pages = {page for request in self.requests.values() for page in request.pages.pages}
        if self.prefix_cache is not None:
            pages.update(self.prefix_cache.draft_valid_pages())
        return sorted(pages)

    def reset_counters(self) -> None:
        """Forgets what was counted, as behind a warm-up."""
        self.num_steps = self.num_finished = self.num_generated_tokens = 0
        self.counters = StepCounters()
        self.scheduler.num_preemptions = 0
        self._teach = lambda: None

    def stats(self) -> EngineStats:
        """Counters at this moment."""
        return EngineStats(
            num_pages=self.pool.num_pages,
            num_free_pages=self.pool.num_free,
            num_used_pages=self.pool.num_used,
            num_cached_pages=self.pool.num_cached,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_steps=self.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_finished=self.num_finished,
            num_generated_tokens=self.num_generated_tokens,
            num_late_compilations=compilations.since_readiness(),
            **self.counters.as_stats(),
            speculation_price=self.scheduler.budget.price_per_s,
            speculation_reason=self.scheduler.budget.reason,
        )

    def _draft(self, plan: StepPlan) -> Sequence[CandidateTable | None]:
        guessing = self._guessing
        if self.drafter is None or not (plan.speculates or plan.ahead or guessing.is_asking):
            return [None] * len(plan.items)
        # Nothing is asked on the strength of a context that an answer has shown to be lost.
        guessing.collect()
        self._note_lost_context()
        tables = guessing.tables(plan, self.drafter, self.lookup)
        self._note_lost_context()
        guessing.ask_ahead(plan.ahead, self.drafter, self.lookup)
        self._note_lost_context()
        return tables

    def _note_lost_context(self) -> None:
        """Behind the loss of the drafter's context: nobody may rely on what is no more."""
        epoch = self.drafter.epoch if self.drafter is not None else 0
        if epoch == self._draft_epoch:
            return
        self._draft_epoch = epoch
        for request in self.requests.values():
            request.lose_draft_context()
        if self.prefix_cache is not None:
            self.prefix_cache.void_draft_context()

    def _verify(self, plan: StepPlan, batch: StepBatch) -> _Verified:
        reads_taps = any(item.keeps_context for item in plan.items)
        tap_ids = self.drafter.tap_layer_ids if self.drafter is not None and reads_taps else ()
        logits, taps = self.target.verify(batch, tap_ids)
        return _Verified(logits=logits, taps=taps)

    def _accept(
        self, plan: StepPlan, trees: list[DraftTree], batch: StepBatch, verified: _Verified
    ) -> list[AcceptedPath | None]:
        """The accepted path of each item that chooses a token; None for the others."""
        chosen = [i for i, item in enumerate(plan.items) if item.is_last]
        paths: list[AcceptedPath | None] = [None] * len(plan.items)
        if not chosen or verified.logits is None:
            return paths
        items = [plan.items[i] for i in chosen]
        # A prompt chunk is chosen from at its last row.
        ends = [*batch.logits_starts[1:], len(batch.logits_rows)]
        roots = [batch.logits_starts[i] if plan.items[i].num_rows == 1 else ends[i] - 1 for i in chosen]
        accepted = self.acceptor(items, roots, [trees[i] for i in chosen], verified.logits)
        for i, path in zip(chosen, accepted, strict=True):
            paths[i] = path
        return paths

    def _commit(self, plan: StepPlan, outcome: StepOutcome) -> list[RequestDelta]:
        deltas: list[RequestDelta] = []
        records: list[TreeRecord] = []
        for item, tree, path in zip(plan.items, outcome.trees, outcome.paths, strict=True):
            request = item.request
            if request.has_ended:
                # Aborted while this was computed.
                self._let_go(request)
                continue
            if path is None:
                request.num_computed += item.num_rows
                self._share_pages(request)
                continue
            context = request.num_computed
            appended = request.append(path.token_ids)
            num_kept = len(appended.token_ids)
            request.num_computed = context + (num_kept if item.num_rows == 1 else item.num_rows)
            num_accepted = min(num_kept, len(path.nodes) - 1)
            if item.num_rows == 1:
                request.speculation.record(tree.num_nodes - 1, num_accepted)
            self.num_generated_tokens += num_kept
            self._share_pages(request)
            delta = self._delta(request, appended.token_ids, appended.text, num_accepted)
            accepted = path.nodes[: num_kept + 1]
            if request.params.speculation.include_trees and item.num_rows == 1:
                delta.tree = told_tree(request, tree, accepted)
            deltas.append(delta)
            records.append(
                TreeRecord(
                    request_id=request.request_id, tree=tree, accepted_nodes=accepted, token_ids=appended.token_ids
                )
            )
            if request.finish_reason is not None:
                self._share_draft_context(request)
                self._drop(request)
        if self.on_step is not None:
            self.on_step(StepRecord(step=self.num_steps, requests=records))
        return deltas

    def _commit_kv(self, plan: StepPlan, paths: list[AcceptedPath | None]) -> None:
        source: list[int] = []
        target: list[int] = []
        for item, path in zip(plan.items, paths, strict=True):
            if path is None or item.num_rows > 1:
                continue
            context = item.request.num_computed
            slots = item.request.pages.slots(context, context + path.nodes[-1] + 1)
            for i, node in enumerate(path.nodes):
                if node != i:
                    source.append(slots[node])
                    target.append(slots[i])
        self.target.commit(source, target)

    def _keep_fused(
        self, plan: StepPlan, batch: StepBatch, verified: _Verified, paths: list[AcceptedPath | None]
    ) -> None:
        """Appends the fused vectors of committed rows to the requests whose draft context goes on."""
        if verified.taps is None or self.drafter is None:
            return
        rows: list[int] = []
        counts: list[int] = []
        for item, path, first in zip(plan.items, paths, batch.row_starts, strict=True):
            before = len(rows)
            if item.keeps_context:
                nodes = path.nodes if path is not None and item.num_rows == 1 else range(item.num_rows)
                rows += [first + node for node in nodes[item.request.keep_context(len(nodes)) :]]
            counts.append(len(rows) - before)
        if not rows:
            return
        taps = verified.taps
        if len(rows) < taps.shape[0]:
            taps = taps[upload(torch.tensor(rows), taps.device)]
        for item, part in zip(plan.items, self.drafter.fuse(taps).split(counts), strict=True):
            if part.shape[0]:
                item.request.pending_fused.append(part)

    def _share_pages(self, request: Request) -> None:
        """Tells the prefix cache of full committed pages, and of those whose draft context is now there."""
        if self.prefix_cache is None:
            return
        page_size, pages = self.target.page_size, request.pages.pages
        num_full = request.num_computed // page_size
        num_drafted = min(num_full, request.draft_len // page_size)
        first = min(request.num_cached_pages, request.num_draft_valid_pages)
        if num_full > request.num_cached_pages or num_drafted > request.num_draft_valid_pages:
            keys = request.keys.extend(request.token_ids[: num_full * page_size])
            for i in range(first, num_full):
                is_drafted = request.draft_start <= i * page_size and i < num_drafted
                self.prefix_cache.insert(keys[i], pages[i], draft_valid=is_drafted)
        request.num_cached_pages, request.num_draft_valid_pages = num_full, num_drafted

    def _share_draft_context(self, request: Request) -> None:
        """Projects what is pending of a request that ends, when that completes a page that others may use."""
        if self.drafter is None or self.prefix_cache is None or not request.pending_fused:
            return
        if request.num_computed // self.target.page_size > request.draft_len // self.target.page_size:
            self.drafter.absorb([request])
            self._note_lost_context()
            self._share_pages(request)

    def _drop(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.num_finished += 1

    def _fail(self, plan: StepPlan, error: Exception) -> list[RequestDelta]:
        deltas = []
        for item in plan.items:
            request = item.request
            if request.has_ended:
                if request.status is not RequestStatus.FINISHED:
                    self._let_go(request)
                continue
            request.error = error
            text = request.finish(FinishReason.ERROR)
            self._drop(request)
            deltas.append(self._delta(request, [], text, 0))
        return deltas

    def _delta(self, request: Request, token_ids: list[int], text: str, num_accepted: int) -> RequestDelta:
        logprobs = None
        if request.params.logprobs is not None:
            del request.logprobs[request.num_output - len(request.params.prior_output_token_ids) :]
            logprobs = request.logprobs[len(request.logprobs) - len(token_ids) :]
        return RequestDelta(
            request_id=request.request_id,
            offset=request.num_output - len(token_ids),
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            num_accepted=num_accepted,
            finish_reason=request.finish_reason,
        )
