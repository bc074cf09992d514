"""Policy: which requests compute how many rows in a step, and who waits when pages run out.

First come, first served: requests are admitted in the order of arrival, and the latest arrival is the first to
be preempted. A preempted request gives its pages back and later recomputes its tokens like a prompt.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jetflow_cluster.cache.page_pool import OutOfPagesError, PagePool
from jetflow_cluster.cache.prefix_cache import PrefixCache
from jetflow_cluster.config import DEFAULT_MAX_TREE_NODES
from jetflow_cluster.engine.protocols import Allowance, BudgetPolicy, DecodeLoad, ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request, RequestStatus
from jetflow_cluster.types import SpeculationMode

#: Requests at the head of the queue whose prefixes are hashed ahead.
_NUM_READ_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """Decodes of the next step, by arrival, decided on before the outcome of the present one is known."""

    budget: BudgetPolicy
    allowances: Mapping[int, Allowance]
    #: Of requests that hold pages for whatever the outcome may be.
    items: Mapping[int, ScheduledRequest]

    def serves(self, decoding: Sequence[Request], budget: BudgetPolicy, fair_nodes: int) -> bool:
        """Whether it holds for the requests that decode in fact, of whom each may use so many rows."""
        known = [self.allowances.get(request.arrival) for request in decoding]
        return self.budget is budget and all(one is not None and one.budget_share <= fair_nodes for one in known)


@dataclass(frozen=True, kw_only=True)
class _Cohorts:
    """The decoding requests of a step, in two parts where half of those that draft is guessed for meanwhile."""

    present: Sequence[Request]
    resting: Sequence[Request] = ()
    #: Those of `resting` whose turn is next.
    following: Sequence[Request] = ()


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
        #: Of one step.
        self.max_rows = max_num_batched_tokens
        self._max_chunk = max_prompt_chunk or max_num_batched_tokens
        #: Running at a time.
        self.max_requests = max_num_requests
        self.max_draft_depth = max_draft_depth
        self._num_scratch_rows = num_scratch_rows
        self._needs_draft_context = needs_draft_context
        self._ahead: _Ahead | None = None
        #: Decodes of the next step that are guessed for in the present one, by arrival.
        self._asked: dict[int, ScheduledRequest] = {}
        #: Arrivals of those whose turn is next, and of those that decoded in the last step.
        self._due: frozenset[int] = frozenset()
        self._decoded: frozenset[int] = frozenset()

    def add(self, request: Request) -> None:
        """Appends to the waiting queue."""
        self.waiting.append(request)

    def schedule(self) -> StepPlan:
        """Rows of the next step. Pages for every row of the plan are allocated."""
        items: dict[int, ScheduledRequest] = {}
        decoding = [r for r in self.running if r.num_remaining_rows == 1]
        fair_nodes = self._fair_share(len(decoding), has_prompts=len(decoding) < len(self.running))
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.serves(decoding, self.budget, fair_nodes):
            ahead = _Ahead(budget=self.budget, allowances=self._allowances(decoding, fair_nodes), items={})
        asked = {i: item for i, item in self._asked.items() if i in ahead.allowances and _drafts(ahead.allowances[i])}
        cohorts = self._cohorts(decoding, ahead.allowances)
        for request in cohorts.present:
            if request.status is not RequestStatus.RUNNING:
                continue
            item = asked.get(request.arrival) or ahead.items.get(request.arrival)
            if item is not None and item.max_depth < request.room:
                items[request.arrival] = item
            else:
                self._schedule_decode(request, ahead.allowances[request.arrival], items)
        rows_left = self.max_rows - sum(item.budget_share for item in items.values())
        for request in [r for r in self.running if r.num_remaining_rows > 1]:
            if rows_left > 0 and request.status is RequestStatus.RUNNING:
                rows_left -= self._schedule_chunk(request, rows_left, items)
        while self.waiting and rows_left > 0 and len(self.running) < self.max_requests:
            request = self.waiting[0]
            if not self._admit(request):
                break
            rows_left -= self._schedule_chunk(request, rows_left, items)
        ordered = sorted(items.values(), key=lambda item: item.request.arrival)
        self._decoded = frozenset(request.arrival for request in cohorts.present)
        self._due = frozenset(request.arrival for request in cohorts.following)
        self._asked = self._items_ahead(cohorts.following, ahead.allowances)
        return StepPlan(
            items=tuple(ordered),
            tree_budget=sum(i.budget_share for i in ordered),
            resting=tuple(r for r in cohorts.resting if r.status is RequestStatus.RUNNING),
            ahead=tuple(self._asked.values()),
        )

    def _cohorts(self, decoding: Sequence[Request], allowances: Mapping[int, Allowance]) -> _Cohorts:
        """Who decodes in this step: all, or whose turn it is and who does not draft."""
        if not self.budget.has_cohorts:
            return _Cohorts(present=decoding)
        drafting = [r for r in decoding if _drafts(allowances[r.arrival]) and r.has_draft_context]
        half = (len(drafting) + 1) // 2
        turn = {r.arrival for r in drafting if r.arrival in self._due} or {r.arrival for r in drafting[:half]}
        resting = [r for r in drafting if r.arrival not in turn]
        rests = {r.arrival for r in resting}
        return _Cohorts(
            present=[r for r in decoding if r.arrival not in rests],
            resting=resting,
            following=sorted(resting, key=lambda r: r.arrival in self._decoded)[:half],
        )

    def _items_ahead(
        self, following: Sequence[Request], allowances: Mapping[int, Allowance]
    ) -> dict[int, ScheduledRequest]:
        """The next step's part of requests that rest in this one, by arrival. Nobody is preempted for it: for who gets
        no pages nothing is guessed before its turn comes."""
        items: dict[int, ScheduledRequest] = {}
        for request in following:
            if request.status is not RequestStatus.RUNNING:
                continue
            item = self._decode(request, allowances[request.arrival])
            num_tokens = request.num_computed + self._num_rows_written(item)
            # As for newcomers, one page of slack for each running request.
            if request.pages.num_missing(num_tokens) + len(self.running) <= self.pool.num_available:
                request.pages.ensure(num_tokens)
                items[request.arrival] = item
        return items

    def prepare(self, plan: StepPlan) -> None:
        """Decides on the decodes of the step behind `plan`, whose outcome is not known yet, as far as that can be.

        Who ends, comes or goes in between is for `schedule` to see, which asks the policy anew where what was decided
        does not hold. Nobody is preempted, and no page is taken that others may need at once.
        """
        self._ahead = None
        for request in list(self.waiting)[:_NUM_READ_AHEAD]:
            if self.prefix_cache is not None:
                request.keys.extend(request.token_ids)
        present = {item.request.arrival: item for item in plan.items}
        if any(item.num_rows > 1 for item in plan.items) or any(r.arrival not in present for r in self.running):
            # Behind a prompt's end nothing is known of its draft context.
            return
        # Every step gives a token, so who has room for one ends.
        staying = [item.request for item in plan.items if item.request.room > 1 and not item.request.has_ended]
        fair_nodes = self._fair_share(len(staying), has_prompts=False)
        allowances = self._allowances(staying, fair_nodes)
        items: dict[int, ScheduledRequest] = {}
        wanted: list[tuple[Request, int]] = []
        for request in staying:
            item = items[request.arrival] = self._decode(request, allowances[request.arrival])
            longest = min(request.num_computed + 1 + present[request.arrival].max_depth, request.max_len)
            wanted.append((request, longest + self._num_rows_written(item)))
        missing = sum(request.pages.num_missing(num_tokens) for request, num_tokens in wanted)
        # As for newcomers, one page of slack for each running request.
        has_pages = missing + len(self.running) <= self.pool.num_available
        if has_pages:
            for request, num_tokens in wanted:
                request.pages.ensure(num_tokens)
        items = items if has_pages else {}
        self._ahead = _Ahead(budget=self.budget, allowances=allowances, items=items)

    def finish(self, request: Request) -> None:
        """Takes a request out, whatever its state, and gives its pages back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self._release(request)

    def _fair_share(self, num_decoding: int, *, has_prompts: bool) -> int:
        """Rows that one decoding request may use, so that all fit and no prompt, those that wait included, is
        starved."""
        share = self.max_rows // 2 if has_prompts or self.waiting else self.max_rows
        return max(1, share // max(1, num_decoding))

    def _allowances(self, decoding: Sequence[Request], fair_nodes: int) -> dict[int, Allowance]:
        """What each decoding request may spend, by its arrival: the policy's choice, or what the request demands."""
        found: dict[int, Allowance] = {}
        auto: list[Request] = []
        for request in decoding:
            limits = request.params.speculation
            if limits.mode is SpeculationMode.AUTO:
                auto.append(request)
            elif limits.mode is SpeculationMode.FORCE:
                nodes = min(limits.max_tree_nodes or DEFAULT_MAX_TREE_NODES, fair_nodes)
                found[request.arrival] = Allowance(max_tree_nodes=nodes, budget_share=nodes)
            else:
                found[request.arrival] = Allowance(keeps_context=False)
        if auto:
            computing = [r for r in self.running if r.num_remaining_rows > 1] + list(self.waiting)[:1]
            num_prompt_rows = min(sum(r.num_remaining_rows for r in computing), self.max_rows // 2)
            load = DecodeLoad(
                requests=auto,
                num_decoding=len(decoding),
                fair_nodes=fair_nodes,
                num_prompt_rows=num_prompt_rows,
            )
            found |= zip((request.arrival for request in auto), self.budget.allow(load), strict=True)
        return found

    def _schedule_decode(self, request: Request, allowance: Allowance, items: dict[int, ScheduledRequest]) -> None:
        item = self._decode(request, allowance)
        if item.max_tree_nodes > 1:
            try:
                request.pages.ensure(request.num_computed + self._num_rows_written(item))
            except OutOfPagesError:
                item = replace(item, max_tree_nodes=1, budget_share=1, max_depth=0)
        if item.max_tree_nodes == 1 and not self._ensure_or_preempt(request, request.num_computed + 1, items):
            return
        items[request.arrival] = item

    def _decode(self, request: Request, allowance: Allowance) -> ScheduledRequest:
        """A decoding request's part of a step, where it gets the pages for it."""
        limits = request.params.speculation
        depths = (self.max_draft_depth, request.room - 1, limits.max_depth, allowance.max_depth)
        depth = min(d for d in depths if d is not None)
        most = limits.max_tree_nodes or allowance.max_tree_nodes
        nodes, share = min(allowance.max_tree_nodes, most), min(allowance.budget_share, most)
        if depth < 1 or nodes == 1:
            depth, nodes, share = 0, 1, 1
        return ScheduledRequest(
            request=request,
            num_rows=1,
            is_last=True,
            max_tree_nodes=nodes,
            budget_share=share,
            max_depth=depth,
            draft_depth=allowance.draft_depth,
            draft_width=allowance.draft_width,
            uses_head=allowance.uses_head,
            least_match=allowance.least_match,
            keeps_context=self._needs_draft_context and allowance.keeps_context,
            bias=allowance.bias,
        )

    def _num_rows_written(self, item: ScheduledRequest) -> int:
        """Rows behind the context that a decode writes, those of the draft head's block included."""
        return max(item.max_tree_nodes, self._num_scratch_rows) if item.max_tree_nodes > 1 else 1

    def _keeps_context(self, request: Request) -> bool:
        """Whether the draft context of a prompt goes on."""
        is_forced = request.params.speculation.mode is SpeculationMode.FORCE
        return self._needs_draft_context and request.wants_speculation and (is_forced or self.budget.keeps_context)

    def _schedule_chunk(self, request: Request, rows_left: int, items: dict[int, ScheduledRequest]) -> int:
        """Schedules the next tokens of a prompt; returns how many."""
        num_rows = min(request.num_remaining_rows, rows_left, self._max_chunk)
        if not self._ensure_or_preempt(request, request.num_computed + num_rows, items):
            return 0
        is_last = num_rows == request.num_remaining_rows
        items[request.arrival] = ScheduledRequest(
            request=request, num_rows=num_rows, is_last=is_last, keeps_context=self._keeps_context(request)
        )
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
        request.num_computed = request.draft_start = request.draft_len = request.fused_len = 0
        request.num_cached_pages = request.num_draft_valid_pages = 0
        request.pending_fused.clear()

    def _admit(self, request: Request) -> bool:
        """Moves the head of the queue to the running ones when the pool holds all that it must compute."""
        matched: list[int] = []
        if self.prefix_cache is not None and request.params.prompt_logprobs is None:
            matched = self.prefix_cache.match(
                request.keys.extend(request.token_ids),
                max_tokens=len(request.token_ids) - 1,
                need_draft=self._keeps_context(request),
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
            if self._keeps_context(request):
                request.draft_len = request.fused_len = request.num_computed
            request.num_cached_pages = len(matched)
            request.num_draft_valid_pages = request.draft_len // page_size
        if request.num_preemptions == 0:
            request.usage.cached_tokens = min(request.num_computed, len(request.prompt_token_ids))
        return True


def _drafts(allowance: Allowance) -> bool:
    return allowance.max_tree_nodes > 1 and allowance.uses_head
