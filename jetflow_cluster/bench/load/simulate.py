"""Predicted speed of speculation at each load, from a cost model and mean lengths by tree size.

The steady state: r requests decode, each with a tree of n nodes that yields a(n) tokens per step. With n = 1 nothing is
drafted. The best n is the one with the most tokens per second; the engine's policy looks for the same, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jetflow_cluster.engine.cost_model import CostModel, StepShape

#: A gain below this share is no gain, as for the engine's policy.
MIN_GAIN = 1.04


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where target and head run."""

    name: str
    cost: CostModel
    #: Dedicated draft workers, which share the requests; 0 is a head on the target's own ranks.
    num_draft_workers: int = 0
    #: Seconds of the way to a dedicated worker and back.
    link_s: float = 0.0
    #: Requests whose contexts fit.
    max_requests: int = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load."""

    num_requests: int
    #: Nodes per tree with the most tokens per second; 1 is no speculation.
    num_nodes: int
    #: Seconds of a step, and tokens per second of all requests, with that and without speculation.
    step_s: float
    tokens_per_s: float
    off_tokens_per_s: float
    #: Whether two cohorts are in flight, one drafted while the other is verified.
    has_cohorts: bool
    #: Tokens per second with each tree size.
    by_nodes: dict[int, float]

    @property
    def gain(self) -> float:
        """Over not speculating."""
        return self.tokens_per_s / self.off_tokens_per_s


def step_s(
    placement: Placement, num_requests: int, num_nodes: int, context: int, block_size: int
) -> tuple[float, bool]:
    """Seconds in which each of the requests makes one step, and whether two cohorts are the faster way.

    With dedicated workers each one guesses for its part of the requests. Two cohorts take
    ``2 max(Tv(r/2), Td(r/2))``, one takes ``Tv(r) + Td(r)``.
    """

    def times(num: float) -> tuple[float, float]:
        shape = StepShape(
            num_requests=round(num), num_rows=round(num * num_nodes), num_context_tokens=round(num * context)
        )
        verify = placement.cost.step_s(shape)
        if num_nodes == 1:
            return verify, 0.0
        drafted = num / max(1, placement.num_draft_workers)
        draft = float(placement.cost.drafting_s(drafted * block_size, drafted * context))
        return verify, draft + placement.link_s

    verify, draft = times(num_requests)
    if num_nodes == 1 or not placement.num_draft_workers or num_requests < 2:
        return verify + draft, False
    half = 2 * max(times(num_requests / 2))
    return min(half, verify + draft), half < verify + draft


def predict(
    placement: Placement,
    lengths: Mapping[int, float],
    loads: Sequence[int],
    *,
    context: int = 1024,
    block_size: int = 16,
) -> list[Point]:
    """One point per load that fits.

    Args:
        placement: with its cost model.
        lengths: mean tokens per step by nodes; 1 must be among them.
        loads: numbers of requests.
        context: mean tokens behind each request.
        block_size: rows of a guess.
    """
    points = []
    for num in (load for load in loads if load <= placement.max_requests):
        took = {n: step_s(placement, num, n, context, block_size) for n in lengths}
        rates = {n: num * lengths[n] / took[n][0] for n in lengths}
        best = max(rates, key=lambda n: rates[n])
        if rates[best] < MIN_GAIN * rates[1]:
            best = 1
        points.append(
            Point(
                num_requests=num,
                num_nodes=best,
                step_s=took[best][0],
                tokens_per_s=rates[best],
                off_tokens_per_s=rates[1],
                has_cohorts=took[best][1],
                by_nodes=rates,
            )
        )
    return points


def crossing(points: Sequence[Point], num_nodes: int | None = None) -> int | None:
    """The first load at which speculation does not pay any more: with the best size, or with a fixed one. None: it pays
    at all of them."""
    for point in points:
        rate = point.tokens_per_s if num_nodes is None else point.by_nodes[num_nodes]
        if rate < MIN_GAIN * point.off_tokens_per_s:
            return point.num_requests
    return None
