"""Greedy requests' own texts as a source of guesses, beside the drafter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.lookup import (
    MAX_LOOKUP_DEPTH,
    ContextIndex,
    ContextMatch,
    guess_of,
    lookup_table,
    mix_lookup,
)

#: From this length on a match guesses alone: the drafter would add less than its pass costs.
SURE_MATCH = 24
#: Steps between two looks where no head guesses and no text repeated itself.
_PAUSE = 3


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where a request's text repeats itself."""

    match: ContextMatch
    #: The match guesses alone.
    is_sure: bool


class ContextLookup:
    """Keeps an index of each request's tokens on the request itself. Any guess is lossless."""

    #: Deepest guess.
    max_depth = MAX_LOOKUP_DEPTH

    def __init__(self) -> None:
        #: Steps until the next look.
        self._pause = 0

    def look(self, plan: StepPlan) -> list[Look | None]:
        """Where requests' texts repeat themselves; to be asked once per step. Requests that sample are not looked at:
        what their noise draws repeats little."""
        if any(item.uses_head and item.max_tree_nodes > 1 for item in plan.items):
            self._pause = 0
            return [_look(item, num_steps=1) for item in plan.items]
        if self._pause:
            self._pause -= 1
            return [None] * len(plan.items)
        looks = [_look(item, num_steps=1 + _PAUSE) for item in plan.items]
        self._pause = 0 if any(look is not None and look.is_sure for look in looks) else _PAUSE
        return looks


def without_sure(plan: StepPlan, looks: Sequence[Look | None]) -> StepPlan:
    """What is left for the drafter: where a match guesses alone, it is not asked."""
    is_sure = [look is not None and look.is_sure for look in looks]
    if not any(sure and item.uses_head for item, sure in zip(plan.items, is_sure, strict=True)):
        return plan
    asked = zip(plan.items, is_sure, strict=True)
    return replace(plan, items=tuple(replace(i, max_tree_nodes=1) if sure else i for i, sure in asked))


def mix_looks(
    items: Sequence[ScheduledRequest], tables: Sequence[CandidateTable | None], looks: Sequence[Look | None]
) -> list[CandidateTable | None]:
    """The drafter's tables with the lookups' guesses mixed in."""
    return [_mixed(*part) for part in zip(items, tables, looks, strict=True)]


def _look(item: ScheduledRequest, *, num_steps: int) -> Look | None:
    match = _match(item, num_steps)
    if match is None:
        return None
    return Look(match=match, is_sure=match.length >= (SURE_MATCH if item.uses_head else item.least_match))


def _match(item: ScheduledRequest, num_steps: int) -> ContextMatch | None:
    """The match of one request, if it is to be looked at; `num_steps` have gone by since the last look."""
    request = item.request
    if item.max_tree_nodes == 1 or not request.params.is_greedy:
        return None
    if not item.uses_head and request.lookup_pause > 0:
        request.lookup_pause -= num_steps
        return None
    if request.context_index is None:
        request.context_index = ContextIndex()
    match = request.context_index.match(request.token_ids, min(item.max_depth, MAX_LOOKUP_DEPTH))
    length = 0 if match is None else match.length
    # Where no head guesses, a match grows by a token per step.
    request.lookup_pause = max(0, item.least_match - length - 1)
    return None if match is None else match.cut()


def _mixed(item: ScheduledRequest, table: CandidateTable | None, look: Look | None) -> CandidateTable | None:
    if look is None:
        return table
    if item.request.params.speculation.include_trees:
        item.request.context_guess = guess_of(look.match, None if look.is_sure else table)
    if look.is_sure:
        return lookup_table(look.match)
    return None if table is None else mix_lookup(table, look.match)
