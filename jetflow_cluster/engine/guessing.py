"""Where a step's guesses come from: the drafter, requests' own texts, and what was asked a step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jetflow_cluster.engine.lookup import ContextLookup, Look, mix_looks, without_sure
from jetflow_cluster.engine.protocols import AheadDrafter, Drafter, ScheduledRequest, StepPlan
from jetflow_cluster.tree.build import CandidateTable


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a drafter elsewhere works at."""

    drafter: AheadDrafter
    items: tuple[ScheduledRequest, ...]
    looks: Sequence[Look | None]


class Guessing:
    """Tables of the present step, and questions about the next one. Any guess is lossless."""

    def __init__(self) -> None:
        self._asked: _Asked | None = None
        #: What was answered, and to what, by the identity of the item.
        self._ready: dict[int, tuple[ScheduledRequest, CandidateTable | None]] = {}

    @property
    def is_asking(self) -> bool:
        """True while an answer is open."""
        return self._asked is not None

    def collect(self) -> None:
        """Takes the answers to what was asked ahead; to be called before the drafter is asked anything else."""
        asked, self._asked = self._asked, None
        self._ready = {}
        if asked is not None:
            tables = mix_looks(asked.items, asked.drafter.answer(), asked.looks)
            self._ready = {id(item): (item, table) for item, table in zip(asked.items, tables, strict=True)}

    def tables(self, plan: StepPlan, drafter: Drafter, lookup: ContextLookup | None) -> Sequence[CandidateTable | None]:
        """One per item; what was not asked ahead is asked now."""
        if not self._ready:
            return self._ask_now(plan, drafter, lookup)
        missing = tuple(item for item in plan.items if id(item) not in self._ready)
        now = iter(self._ask_now(replace(plan, items=missing), drafter, lookup))
        return [self._ready[id(item)][1] if id(item) in self._ready else next(now) for item in plan.items]

    def ask_ahead(self, items: tuple[ScheduledRequest, ...], drafter: Drafter, lookup: ContextLookup | None) -> None:
        """Asks about the next step's part of requests that rest in this one."""
        if not items or not isinstance(drafter, AheadDrafter):
            return
        plan, looks = _looked_at(StepPlan(items=items), lookup)
        drafter.ask(plan)
        self._asked = _Asked(drafter=drafter, items=items, looks=looks)

    @staticmethod
    def _ask_now(plan: StepPlan, drafter: Drafter, lookup: ContextLookup | None) -> Sequence[CandidateTable | None]:
        if not plan.speculates:
            return [None] * len(plan.items)
        asked, looks = _looked_at(plan, lookup)
        found = drafter.draft(asked) if asked.speculates else [None] * len(plan.items)
        return found if lookup is None else mix_looks(plan.items, found, looks)


def _looked_at(plan: StepPlan, lookup: ContextLookup | None) -> tuple[StepPlan, Sequence[Look | None]]:
    """What is left for the drafter, and where requests' texts repeat themselves."""
    if lookup is None:
        return plan, [None] * len(plan.items)
    looks = lookup.look(plan)
    return without_sure(plan, looks), looks
