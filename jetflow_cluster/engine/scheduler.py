"""Policy: which requests compute how many rows in a step, and who waits when pages run out.

First come, first served: requests are admitted in the order of arrival, and the latest arrival is the first to
be preempted. A preempted request gives its pages back and later recomputes its tokens like a prompt.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence

from jetflow_cluster.cache.page_pool import OutOfPagesError, PagePool
from jetflow_cluster.cache.prefix_cache import PrefixCache
from jetflow_cluster.config import DEFAULT_MAX_TREE_NODES
from jetflow_cluster.engine.protocols import BudgetPolicy, ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request, RequestStatus
from jetflow_cluster.types import SpeculationMode


class Scheduler:
    """Queues of waiting and running requests over one page pool."""

    def __init__(
        self,
        pool: PagePool,
        prefix_cache: PrefixCache | None,
        *,
        max_num_batched_tokens: int,
        max_prompt_chunk: int | None,
        max_num_requests: int,
        max_draft_depth: int,
        num_scratch_rows: int,
        needs_draft_context: bool,
        budget: BudgetPolicy,
    ):
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.budget = budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._max_rows = max_num_batched_tokens
        self._max_chunk = max_prompt_chunk or max_num_batched_tokens
        self._max_requests = max_num_requests
        self.max_draft_depth = max_draft_depth
        self._num_scratch_rows = num_scratch_rows
        self._needs_draft_context = needs_draft_context

    def add(self, request: Request) -> None:
        """Appends to the waiting queue."""
        self.waiting.append(request)

    def schedule(self) -> StepPlan:
        """Rows of the next step. Pages for every row of the plan are allocated."""
        items: dict[int, ScheduledRequest] = {}
        decoding = [r for r in self.running if r.num_remaining_rows == 1]
        fair_nodes = self._fair_share(decoding)
        for request in decoding:
            if request.status is RequestStatus.RUNNING:
                self._schedule_decode(request, len(decoding), fair_nodes, items)
        rows_left = self._max_rows - sum(item.budget_share for item in items.values())
        for request in [r for r in self.running if r.num_remaining_rows > 1]:
            if rows_left > 0 and request.status is RequestStatus.RUNNING:
                rows_left -= self._schedule_chunk(request, rows_left, items)
        while self.waiting and rows_left > 0 and len(self.running) < self._max_requests:
            request = self.waiting[0]
            if not self._admit(request):
                break
            rows_left -= self._schedule_chunk(request, rows_left, items)
        ordered = sorted(items.values(), key=lambda item: item.request.arrival)
        return StepPlan(items=tuple(ordered), tree_budget=sum(i.budget_share for i in ordered))

    def finish(self, request: Request) -> None:
        """Takes a request out, whatever its state, and gives its pages back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self._release(request)

    def _fair_share(self, decoding: Sequence[Request]) -> int:
        """Rows that one decoding request may use, so that all fit and no prompt is starved."""
        has_prompts = bool(self.waiting) or len(decoding) < len(self.running)
        share = self._max_rows // 2 if has_prompts else self._max_rows
        return max(1, share // max(1, len(decoding)))

    def _schedule_decode(
        self, request: Request, num_decoding: int, fair_nodes: int, items: dict[int, ScheduledRequest]
    ) -> None:
        limits = request.params.speculation
        depth = min(self.max_draft_depth, request.room - 1, limits.max_depth or self.max_draft_depth)
        if limits.mode is SpeculationMode.OFF or depth < 1:
            nodes = 1
        elif limits.mode is SpeculationMode.FORCE:
            nodes = min(limits.max_tree_nodes or DEFAULT_MAX_TREE_NODES, fair_nodes)
        else:
            nodes = min(self.budget.nodes_per_tree(num_decoding), fair_nodes)
            nodes = min(nodes, limits.max_tree_nodes or nodes)
        share = nodes
        if nodes > 1 and num_decoding > 1 and limits.mode is SpeculationMode.AUTO:
            # The trees of a step compete for the sum of the shares, so one may outgrow its own.
            nodes = min(2 * nodes, limits.max_tree_nodes or 2 * nodes)
        if nodes > 1:
            try:
                request.pages.ensure(request.num_computed + max(nodes, self._num_scratch_rows))
            except OutOfPagesError:
                nodes = share = 1
        if nodes == 1:
            depth = 0
            if not self._ensure_or_preempt(request, request.num_computed + 1, items):
                return
        items[request.arrival] = ScheduledRequest(
            request=request, num_rows=1, is_last=True, max_tree_nodes=nodes, budget_share=share, max_depth=depth
        )

    def _schedule_chunk(self, request: Request, rows_left: int, items: dict[int, ScheduledRequest]) -> int:
        """Schedules the next tokens of a prompt; returns how many."""
        num_rows = min(request.num_remaining_rows, rows_left, self._max_chunk)
        if not self._ensure_or_preempt(request, request.num_computed + num_rows, items):
            return 0
        is_last = num_rows == request.num_remaining_rows
        items[request.arrival] = ScheduledRequest(request=request, num_rows=num_rows, is_last=is_last)
        return num_rows

    def _ensure_or_preempt(self, request: Request, num_tokens: int, items: dict[int, ScheduledRequest]) -> bool:
        """Gets pages for a request, from the latest arrivals if need be; False when it was preempted itself."""
        while True:
            try:
                request.pages.ensure(num_tokens)
                return True
            except OutOfPagesError:
                victim = max(self.running, key=lambda r: r.arrival)
                self.preempt(victim)
                items.pop(victim.arrival, None)
                if victim is request:
                    return False

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages and puts it back into the queue, in the order of arrival."""
        self.running.remove(request)
        request.status = RequestStatus.WAITING
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        queue = list(self.waiting)
        insort(queue, request, key=lambda r: r.arrival)
        self.waiting = deque(queue)

    def _release(self, request: Request) -> None:
        request.pages.release_all()
        request.num_computed = request.draft_len = 0
        request.num_cached_pages = request.num_draft_valid_pages = 0
        request.pending_fused.clear()
        request.is_draft_lost = False

    def _admit(self, request: Request) -> bool:
        """Moves the head of the queue to the running ones when the pool holds all that it must compute."""
        matched: list[int] = []
        if self.prefix_cache is not None and request.params.prompt_logprobs is None:
            matched = self.prefix_cache.match(
                request.keys.extend(request.token_ids),
                max_tokens=len(request.token_ids) - 1,
                need_draft=request.wants_speculation and self._needs_draft_context,
            )
        page_size = request.pages.page_size
        needed = -(-len(request.token_ids) // page_size) - len(matched)
        # One page of slack for each running request, so that the newcomer is not preempted at once.
        if needed + len(self.running) > self.pool.num_available:
            # The end of a prefix goes first, for its beginning is worth more.
            for page in reversed(matched):
                self.pool.release(page)
            return False
        self.waiting.popleft()
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        if matched:
            request.pages.adopt(matched)
            request.num_computed = len(matched) * page_size
            request.draft_len = request.num_computed if request.wants_speculation else 0
            request.num_cached_pages = len(matched)
            request.num_draft_valid_pages = request.draft_len // page_size
        if request.num_preemptions == 0:
            request.usage.cached_tokens = min(request.num_computed, len(request.prompt_token_ids))
        return True
