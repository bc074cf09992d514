"""Mode ``auto``: who drafts and what is verified, from what a step costs and what guesses are worth.

Before drafting, `choose` weighs expected gains against the cost of the step. It must promise `TURN_ON` times the tokens
per second of not drafting before drafting begins, and goes on while it keeps `TURN_OFF`; so noise at the crossing
decides nothing. While nothing is drafted no hidden vectors are kept either, and a step costs what it costs without
speculation; draft contexts begin anew when drafting comes near to paying. Where guesses and not the load are the
reason, a `Prober` tries again. Long repetitions of a request's own text need no head and are tried at any load.

Steps of each kind are timed as well: one that falls behind plain steps is left out for a while, and drafting that is
ahead of them goes on, whatever the costs foretell (`jetflow_cluster.engine.pace`).

Behind drafting, scores are calibrated and the trees of all requests compete at the price of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jetflow_cluster.engine.begun_steps import BegunStep, BegunSteps
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.draft_choice import NODES, Choice, Gains, Situation, choose, paying_match
from jetflow_cluster.engine.learning import Learning, kind_of
from jetflow_cluster.engine.look_times import LookTimes
from jetflow_cluster.engine.pace import StepKind
from jetflow_cluster.engine.protocols import Allowance, DecodeLoad, ScheduledRequest, Source, StepPlan
from jetflow_cluster.engine.reason_log import ReasonLog
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.value_model import ValueModel
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import SCORE_UNIT, CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH
from jetflow_cluster.types import LatencyClass

#: Expected tokens per second over those of not drafting at which drafting begins, and below which it ends.
TURN_ON, TURN_OFF = 1.10, 1.03
#: Drafting for all, this near to paying, draft contexts go on.
KEEP_CONTEXT = 1.05
#: Plain steps of which one is learned from, where the load is the reason.
_LEARN_SELDOM = 4
#: Most nodes of one tree.
_MOST_NODES = 64
#: Tokens of the prefixes that prices are told apart by.
_CONTEXT_STEP = 64
#: Fewest candidates that the head offers at each depth.
_LEAST_WIDTH = 7
#: Rows that a request which only repeats itself adds to those that the trees share.
_LOOKUP_SHARE = 4
#: Share of what two cohorts promise that counts before they begin.
_COHORT_SHARE = 0.95
#: Worth of a token of each latency class, as a bias of scores: the price of an interactive request's nodes is halved.
LATENCY_BIAS = {
    LatencyClass.INTERACTIVE: round(math.log(2.0) * SCORE_UNIT),
    LatencyClass.NORMAL: 0,
    LatencyClass.BATCH: -round(math.log(2.0) * SCORE_UNIT),
}


class PricedBudget:
    """See the module; implements `BudgetPolicy`.

    Args:
        cost: of a step, as measured.
        gains: of a request, as measured.
        value: calibration of scores.
        needs_context: whether the drafter reads hidden vectors.
        num_block_slots: slots of the head's block, where it cannot be cut shorter.
        has_lookup: whether requests' own texts are looked at too.
        may_overlap: whether the drafter can guess while the target verifies.
    """

    def __init__(
        self,
        cost: CostModel,
        gains: Gains,
        *,
        value: ValueModel | None = None,
        needs_context: bool = True,
        num_block_slots: int | None = None,
        has_lookup: bool = False,
        may_overlap: bool = False,
    ):
        self.learning = Learning(cost, value or ValueModel())
        self.reason = "idle"
        self.price_per_s = 0.0
        self.keeps_context = True
        self.is_on = self.has_cohorts = False
        self._may_overlap = may_overlap
        self.gains = gains
        self._needs_context, self._num_block_slots, self._has_lookup = needs_context, num_block_slots, has_lookup
        self._choice: Choice | None = None
        self._drafting: dict[int, float] = {}
        self._probing: set[int] = set()
        #: The next step is decided on before this one's outcome is told.
        self._begun = BegunSteps()
        self._times = LookTimes()
        #: Plain steps while the load is the reason.
        self._num_plain = 0
        #: To whom, of how many and with how many nodes each, and what was allowed; it holds until something is learned
        #: or decided. And the step in which something was.
        self._allowed: tuple[tuple[list[int], int, int], list[Allowance]] | None = None
        self._allowed_at = 0
        #: Plain steps were asked for since something was learned.
        self._is_timing = False
        #: Shortest match of a request's own text that pays by itself, None where none does; and whether that is known
        #: since the last decision.
        self._least_match: int | None = None
        self._knows_match = False
        self._reason_log = ReasonLog()

    @property
    def cost(self) -> CostModel:
        """The cost model as it stands."""
        return self.learning.cost

    @property
    def maps(self) -> np.ndarray | None:
        """See `BudgetPolicy`."""
        return self.learning.value.maps

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        """See `BudgetPolicy`."""
        times = self._times
        times.num_steps += 1
        allowed_to = [request.arrival for request in load.requests], load.fair_nodes, load.num_decoding
        if self._allowed is not None and self._allowed[0] == allowed_to and not times.is_due:
            return self._allowed[1]
        is_news = times.is_news(load, is_on=self.is_on, expects_others=self.reason == "head")
        if times.is_due or is_news:
            self._decide(load, is_news=is_news)
            times.looked(load, is_seldom=self._is_off_by_load and not is_news)
        pace = self.learning.pace
        if self.is_on and not self._is_timing and pace.wants_plain(load.num_decoding):
            self._is_timing, self._allowed = True, None
            self._drafting, self._probing = {}, set()
            return [Allowance(uses_head=False)] * len(load.requests)
        self._probing = set()
        self._drafting = self._chosen(load)
        may_look = self._has_lookup and load.fair_nodes >= _LOOKUP_SHARE
        may_look = may_look and pace.allows(StepKind.LOOKUP, load.num_decoding)
        rests: dict[tuple[bool, bool], Allowance] = {}
        found = [self._allowance(request, load, rests, may_look=may_look) for request in load.requests]
        # A probe counts its steps, and contexts may become ready.
        is_settled = not self._probing and (not self.is_on or len(self._drafting) == self._num_wanted(load))
        self._allowed = (allowed_to, found) if is_settled else None
        self._allowed_at = times.num_steps
        return found

    @property
    def _is_off_by_load(self) -> bool:
        return self.reason == "load" and not self.is_on

    def _num_wanted(self, load: DecodeLoad) -> int:
        """Requests that are to draft, if they have the context for it."""
        assert self._choice is not None
        return min(self._choice.num_drafted, sum(request.room > 1 for request in load.requests))

    def _rest(self, load: DecodeLoad, *, keeps_context: bool, may_look: bool) -> Allowance:
        """Of a request that does not draft."""
        if may_look and not self._knows_match:
            self._least_match, self._knows_match = paying_match(self.cost, self._situation(load)), True
        if not may_look or self._least_match is None:
            return Allowance(keeps_context=keeps_context, uses_head=False)
        return Allowance(
            max_tree_nodes=min(1 + MAX_LOOKUP_DEPTH, load.fair_nodes),
            budget_share=_LOOKUP_SHARE,
            uses_head=False,
            least_match=self._least_match,
            keeps_context=keeps_context,
        )

    def price(
        self, plan: StepPlan, tables: Sequence[CandidateTable | None]
    ) -> tuple[StepPlan, Sequence[CandidateTable | None]]:
        """See `BudgetPolicy`."""
        plan = self.price_rows(plan, [_source(table) for table in tables])
        if plan.row_costs is None:
            return plan, tables
        priced = [i for i, item in enumerate(plan.items) if item.is_priced]
        found = list(tables)
        kinds = [kind_of(plan.items[i].request) for i in priced]
        calibrated = self.learning.value.calibrate([tables[i] for i in priced], kinds)
        for i, table in zip(priced, calibrated, strict=True):
            found[i] = table
        return plan, found

    def price_rows(self, plan: StepPlan, sources: Sequence[Source]) -> StepPlan:
        """See `BudgetPolicy`."""
        items = plan.items
        is_plain = self._is_off_by_load and all(source is Source.NONE for source in sources)
        if is_plain:
            self._num_plain += 1
            if self._num_plain % _LEARN_SELDOM:
                return plan
        asked = [item for item, source in zip(items, sources, strict=True) if source is Source.HEAD and item.asks_head]
        decoding = [item for item in items if item.num_rows == 1 and item.is_last]
        begun = BegunStep(
            items=items,
            num_context_tokens=sum(item.request.num_computed for item in decoding),
            num_draft_rows=self._draft_rows(asked),
            num_resting=len(plan.resting),
            num_resting_context_tokens=sum(request.num_computed for request in plan.resting),
            foretold=self._drafting,
            num_steps=_LEARN_SELDOM if is_plain else 1,
        )
        self._begun.note(begun)
        priced = [item for item in decoding if not item.is_forced]
        if all(source is Source.NONE for item, source in zip(items, sources, strict=True) if item.is_priced):
            return plan
        num_draft_rows = self._draft_rows([item for item in asked if item.is_priced])
        # Rounded: what a few tokens of it cost is nothing.
        context = sum(item.request.num_computed for item in priced) // _CONTEXT_STEP * _CONTEXT_STEP
        shape = StepShape(
            num_requests=len(priced),
            num_rows=len(priced),
            num_context_tokens=context,
            num_draft_rows=num_draft_rows,
            num_draft_context_tokens=context if num_draft_rows else 0,
            num_prompt_rows=sum(i.budget_share if i.is_forced else i.num_rows for i in items if not i.is_priced),
            is_overlapped=bool(plan.resting),
        )
        most = min(
            max(plan.tree_budget, sum(item.budget_share for item in priced)),
            sum(item.max_tree_nodes for item in priced),
        )
        return StepPlan(
            items=items,
            tree_budget=plan.tree_budget,
            row_costs=self.cost.row_costs(shape, most),
            resting=plan.resting,
            ahead=plan.ahead,
        )

    def _draft_rows(self, asked: Sequence[ScheduledRequest]) -> int:
        """Rows of the head where it guesses for these."""
        # Other sources may guess deeper than the head.
        slots = 1 + min(max((item.head_depth for item in asked), default=0), self.gains.accepted.shape[1])
        return len(asked) * (self._num_block_slots or slots)

    def observe(
        self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> None:
        """See `BudgetPolicy`."""
        begun = self._begun.of(plan)
        if begun is not None and self.learning.note(begun, trees, paths, took_s):
            self._allowed, self._is_timing = None, False

    def _decide(self, load: DecodeLoad, *, is_news: bool = True) -> None:
        """Whether drafting is on, and why."""
        self.learning.catch_up()
        self._allowed, self._is_timing = None, False
        pace, prober = self.learning.pace, self.learning.prober
        self._knows_match = False
        now = self._choose(load, load.requests, self.gains)
        is_wanted = now.ratio >= (TURN_OFF if self.is_on else TURN_ON)
        # What is timed counts for more than what is foretold.
        is_wanted = is_wanted or (self.is_on and pace.is_ahead(StepKind.HEAD, load.num_decoding))
        self.is_on = is_wanted and pace.allows(StepKind.HEAD, load.num_decoding)
        self.has_cohorts = self.is_on and now.num_cohorts == 2
        self._choice = now
        if is_wanted and not self.is_on:
            self.keeps_context = False
            self.price_per_s = now.tokens_per_s
            prober.stop()
            self._tell("pace", now)
            return
        if self.is_on:
            self.keeps_context = True
            self.price_per_s = now.tokens_per_s
            self._tell("pays", now)
            return
        if not self._times.takes_hope() and self._is_off_by_load and not is_news:
            self.price_per_s = now.tokens_per_s
            return
        hoped = self._choose(load, load.requests, self.gains.hoped(), is_hope=True)
        is_load = hoped.ratio < TURN_ON
        # Where the load is the reason, it may fall; where guesses are, a probe keeps what it needs.
        all_of_them = self._choose(load, load.requests, self.gains, only_all=True)
        self.keeps_context = is_load and all_of_them.ratio >= KEEP_CONTEXT
        self.price_per_s = now.tokens_per_s
        if is_load:
            prober.stop()
        self._tell("load" if is_load else "head", now)

    def _choose(
        self,
        load: DecodeLoad,
        requests: Sequence[Request],
        gains: Gains,
        *,
        is_hope: bool = False,
        only_all: bool = False,
    ) -> Choice:
        worths = np.array([self._worth(request, gains, is_hope=is_hope) for request in requests])
        share = 0.0 if not self._may_overlap else 1.0 if self.has_cohorts else _COHORT_SHARE
        return choose(
            self.cost,
            gains,
            np.sort(worths)[::-1],
            self._situation(load),
            only_all=only_all,
            cohort_share=share,
        )

    def _situation(self, load: DecodeLoad) -> Situation:
        return Situation(
            num_requests=load.num_decoding,
            num_context_tokens=sum(request.num_computed for request in load.requests),
            num_prompt_rows=load.num_prompt_rows,
            max_nodes=max(2, min(_MOST_NODES, load.fair_nodes)),
            num_block_slots=self._num_block_slots,
        )

    def _worth(self, request: Request, gains: Gains, *, is_hope: bool = False) -> float:
        """Factor of a request's gains: its kind, its own past, its latency class, and the tokens that it may still
        emit."""
        kind = kind_of(request)
        worth = gains.sampled_share if kind else 1.0
        if is_hope:
            return worth
        worth *= self.learning.level(kind) * request.worth.value
        worth *= math.exp(LATENCY_BIAS[LatencyClass(request.params.speculation.latency_class)] / SCORE_UNIT)
        most = float(gains.accepted.max())
        return worth * min(1.0, (request.room - 1) / most) if most > 0 else 0.0

    def _chosen(self, load: DecodeLoad) -> dict[int, float]:
        """The requests that draft in this step, by identity, with the accepted tokens foretold for each; the level of
        all is not in that."""
        assert self._choice is not None
        able = [r for r in load.requests if r.room > 1 and (r.has_draft_context or not self._needs_context)]
        choice = self._choice
        if self.is_on:
            drafting = able
            if len(able) > choice.num_drafted:
                drafting = sorted(able, key=lambda r: -self._worth(r, self.gains))[: choice.num_drafted]
            if not able:
                self.reason = "context"
        elif self.reason == "head":
            # Their contexts are kept from here on, for as long as the probe takes.
            self._probing = {id(r) for r in self.learning.prober.probed(load.requests, self._probe_s(load))}
            drafting = self.learning.prober.ready(self._needs_context) if self._probing else []
        else:
            drafting = []
        row = NODES.index(choice.num_nodes)
        gain = float(self.gains.accepted[row, choice.depth - 1])
        return {id(r): gain * r.worth.value * (self.gains.sampled_share if kind_of(r) else 1.0) for r in drafting}

    def _probe_s(self, load: DecodeLoad) -> float:
        """Seconds that a probe is expected to take, contexts included."""
        num = min(4, len(load.requests))
        slots = self._num_block_slots or 1 + self.gains.accepted.shape[1]
        drafted_s = self.cost.drafting_s(num * slots) + self.cost.trees_s(load.num_decoding, 7 * num)
        return float(4 * drafted_s + 1.5 * self.cost.rows_s(load.num_decoding))

    def _allowance(
        self, request: Request, load: DecodeLoad, rests: dict[tuple[bool, bool], Allowance], *, may_look: bool
    ) -> Allowance:
        choice = self._choice
        assert choice is not None
        keeps = self.keeps_context or id(request) in self._probing
        if id(request) in self._drafting:
            nodes = min(_MOST_NODES, load.fair_nodes)
            if len(load.requests) > 1:
                nodes = min(nodes, max(8, 2 * choice.num_nodes))
            bias = request.worth.bias + LATENCY_BIAS[LatencyClass(request.params.speculation.latency_class)]
            return Allowance(
                max_tree_nodes=nodes if nodes == 1 else min(_MOST_NODES, 2 * nodes),
                budget_share=nodes,
                draft_depth=choice.depth if self.is_on else None,
                draft_width=max(_LEAST_WIDTH, choice.num_nodes - 1) if self.is_on else None,
                keeps_context=keeps,
                bias=bias,
            )
        request.worth.rested(self._times.num_steps - self._allowed_at)
        key = (keeps, may_look and request.params.is_greedy and request.room >= 4)
        if key not in rests:
            # One for all that are alike.
            rests[key] = self._rest(load, keeps_context=key[0], may_look=key[1])
        return rests[key]

    def _tell(self, reason: str, choice: Choice) -> None:
        if reason != self.reason:
            self.reason = reason
            levels = self.learning.level(0), self.learning.level(1)
            self._reason_log.tell(reason, choice.ratio, self.gains.most_of_head, levels)


def _source(table: CandidateTable | None) -> Source:
    """A lookup alone has one candidate per depth."""
    if table is None:
        return Source.NONE
    return Source.HEAD if table.ids.shape[1] > 1 else Source.CHAIN
