"""What a policy learns from the steps that it decided on: costs, the pace of each kind, calibration, levels.

Steps are learned from a few at once. Beside a step of some milliseconds, which fills the processor's caches with
weights, it is not the arithmetic that takes the time but to have code and figures there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetflow_cluster.engine.begun_steps import BegunStep
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.cost_tracker import CostTracker
from jetflow_cluster.engine.pace import Pace
from jetflow_cluster.engine.probing import Prober
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.value_model import ValueModel, promised_tokens
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree

#: Steps that are learned from at once.
_NUM_AT_ONCE = 8
#: Steps between two whose time is learned from; drafted steps from which the calibration learns at first, and between
#: two from which it does later.
_COST_EVERY, _NUM_NEW, _LEARN_EVERY = 4, 64, 8
#: Tokens that the level of all requests' gains counts for before anything is known, its decay per drafted step, and
#: that per plain step where gains are above warm-up's: what was seen is more and more of requests that are gone.
_LEVEL_PRIOR, _LEVEL_FADE, _HOPE_FADE = 12.0, 0.98, 0.99


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """One step and what became of it."""

    begun: BegunStep
    trees: Sequence[DraftTree]
    paths: Sequence[AcceptedPath | None]
    took_s: float


class Learning:
    """What is known, and what waits to be learned.

    Args:
        cost: of a step, as measured.
        value: calibration of scores.
    """

    def __init__(self, cost: CostModel, value: ValueModel):
        self.value = value
        self.pace = Pace()
        self.prober = Prober()
        self._tracker = CostTracker(cost)
        #: Accepted and foretold tokens by kind.
        self._levels = [[_LEVEL_PRIOR, _LEVEL_PRIOR] for _ in range(2)]
        self._waiting: list[_Outcome] = []
        self._num_observed = self._num_learned = 0

    @property
    def cost(self) -> CostModel:
        """The cost model as it stands."""
        return self._tracker.model

    def level(self, kind: int) -> float:
        """Accepted over foretold tokens of all requests of a kind: 0 greedy, 1 sampled."""
        accepted, foretold = self._levels[kind]
        return accepted / foretold

    def note(
        self, begun: BegunStep, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> bool:
        """Counts a step; True when what waited was learned."""
        self._waiting.append(_Outcome(begun=begun, trees=trees, paths=paths, took_s=took_s))
        if len(self._waiting) < _NUM_AT_ONCE:
            return False
        self.catch_up()
        return True

    def catch_up(self) -> None:
        """Learns what waits."""
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            self._learn_from(step)

    def _learn_from(self, step: _Outcome) -> None:
        begun, paths = step.begun, step.paths
        self.prober.earn(begun.num_steps * step.took_s)
        self.pace.observe_step(begun, step.trees, paths, step.took_s, self.cost, self._tracker.measured)
        self._num_observed += begun.num_steps
        if self._num_observed >= _COST_EVERY:
            self._num_observed = 0
            self._observe_cost(step)
        # Trees without a price are not of calibrated scores.
        priced = [i for i, item in enumerate(begun.items) if item.is_priced and paths[i] is not None]
        grown = [i for i in priced if step.trees[i].num_nodes > 1]
        if grown:
            self._observe_values(step, grown)
        else:
            fade = _HOPE_FADE**begun.num_steps
            self._levels = [_faded(level, fade) if level[0] > level[1] else level for level in self._levels]

    def _observe_cost(self, step: _Outcome) -> None:
        items, context = step.begun.items, step.begun.num_context_tokens
        decoding = [i for i, item in enumerate(items) if item.num_rows == 1 and item.is_last]
        shape = StepShape(
            num_requests=len(decoding),
            num_rows=sum(step.trees[i].num_nodes for i in decoding),
            num_context_tokens=context,
            num_draft_rows=step.begun.num_draft_rows,
            num_draft_context_tokens=context if step.begun.num_draft_rows else 0,
            num_prompt_rows=sum(item.num_rows for item in items) - len(decoding),
            is_overlapped=step.begun.num_resting > 0,
        )
        self._tracker.observe(shape, step.took_s)

    def _observe_values(self, step: _Outcome, grown: Sequence[int]) -> None:
        """Counts what became of the trees: for the calibration, for each request, and for all."""
        trees = [step.trees[i] for i in grown]
        walked = [path for i in grown if (path := step.paths[i]) is not None]
        requests = [step.begun.items[i].request for i in grown]
        kinds = [kind_of(request) for request in requests]
        self._num_learned += 1
        if self._num_learned <= _NUM_NEW or self._num_learned % _LEARN_EVERY == 0:
            self.value.observe(trees, [path.nodes for path in walked], kinds)
        self._levels = [_faded(level, _LEVEL_FADE) for level in self._levels]
        for tree, request, kind, path in zip(trees, requests, kinds, walked, strict=True):
            request.worth.drafted(path.num_accepted, promised_tokens(tree))
            if (foretold := step.begun.foretold.get(id(request))) is not None:
                self._levels[kind][0] += path.num_accepted
                self._levels[kind][1] += foretold


def _faded(level: list[float], fade: float) -> list[float]:
    """Drawn towards the prior."""
    return [fade * num + (1.0 - fade) * _LEVEL_PRIOR for num in level]


def kind_of(request: Request) -> int:
    """0 for a greedy request, 1 for one that samples."""
    return 0 if request.params.is_greedy else 1
