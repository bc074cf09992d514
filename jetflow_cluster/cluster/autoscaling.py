"""How many replicas there should be: a pure function of what they tell of themselves, and Serve's policy around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

#: Share of the targets below which load must fall before a replica is given up, so that the number does not swing.
_SLACK = 0.8


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What one replica records; means over the look-back."""

    #: Prompt and output tokens still to be computed, at most.
    outstanding_tokens: float
    #: Share of pages that requests use, 0 to 1.
    kv_cache_usage: float
    #: What requests lately waited for a first token in this replica.
    time_to_first_token_s: float


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What one replica should bear. Raises ValueError naming field, value and limit."""

    outstanding_tokens: float
    kv_cache_usage: float
    time_to_first_token_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} = {getattr(self, field.name)}: must be above 0")


def desired_replicas(current: int, told: Sequence[Signals], targets: Targets) -> int:
    """The number of replicas, before floor, ceiling and delays.

    Tokens and pages are spread over as many replicas as bring each below its target. Where first tokens come too late
    all the same, one more is asked for, once all that were asked for before are there. A replica is given up only when
    the others would stay well below the targets, and first tokens come in time.

    Args:
        current: replicas that run or are on their way.
        told: of those that told anything; none leaves the number as it is.
        targets: of one replica.
    """
    if not told:
        return current
    # Who has told nothing yet has taken nothing yet.
    tokens = sum(signals.outstanding_tokens for signals in told) / targets.outstanding_tokens
    pages = sum(signals.kv_cache_usage for signals in told) / targets.kv_cache_usage
    load = max(tokens, pages)
    is_late = max(signals.time_to_first_token_s for signals in told) > targets.time_to_first_token_s
    wanted = max(1, math.ceil(load))
    if wanted > current:
        return wanted
    if is_late and len(told) >= current:
        return current + 1
    if is_late:
        return current
    return min(current, max(1, math.ceil(load / _SLACK)))


class LoadPolicy:
    """`desired_replicas` as a policy of Serve, which applies floor, ceiling and delays to it.

    Args:
        targets: fields of `Targets`.
    """

    def __init__(self, **targets: float):
        self._targets = Targets(**targets)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and no state of its own."""
        told = signals_of(context.aggregated_metrics or {})
        return desired_replicas(context.target_num_replicas, told, self._targets), {}


def signals_of(metrics: Mapping[str, Mapping[Any, float]]) -> list[Signals]:
    """The signals of each replica that told all of them, from Serve's values by name and replica."""
    names = [field.name for field in fields(Signals)]
    complete = set.intersection(*(set(metrics.get(name, {})) for name in names))
    return [Signals(**{name: metrics[name][replica] for name in names}) for replica in complete]
