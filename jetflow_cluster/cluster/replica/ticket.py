"""What goes into a step loop and comes out of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import EngineStats, RequestDelta


class LoopState(enum.StrEnum):
    """What a step loop does."""

    RUNNING = "running"
    #: Finishes what it has and takes nothing new.
    DRAINING = "draining"
    #: The engine cannot go on; every request ends with reason ``error``.
    FAILED = "failed"
    STOPPED = "stopped"


class NotServingError(RuntimeError):
    """The loop takes no requests.

    Attributes:
        state: why.
    """

    def __init__(self, state: LoopState):
        super().__init__(f"the step loop is {state}")
        self.state = state


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One request in a loop, whose thread alone writes to it. Moments are those of `time.monotonic`."""

    request: Request
    #: On whose behalf it runs.
    owner: str
    arrived_s: float
    #: Of the router's span; empty is none.
    traceparent: str = ""
    #: When it was first given pages and rows; None before.
    scheduled_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    #: Prompt and output tokens still to be computed, at most.
    tokens_left: int = 0
    #: Steps of the request, and guessed nodes in them, that were counted.
    num_counted_steps: int = 0
    num_counted_nodes: int = 0

    @property
    def key(self) -> str:
        """The request's id in the engine; never used twice."""
        return self.request.request_id


@dataclass(frozen=True, kw_only=True)
class TicketUpdate:
    """What became of one request; with a finish reason it is the last."""

    ticket: Ticket
    delta: RequestDelta


@dataclass(frozen=True, kw_only=True)
class LoopReport:
    """What came of one step, or of commands between two."""

    #: Steps so far.
    step: int
    state: LoopState
    updates: list[TicketUpdate]


@dataclass(frozen=True, kw_only=True)
class LoopLoad:
    """How busy a loop is."""

    state: LoopState
    #: As of the last step or command.
    stats: EngineStats
    #: Prompt and output tokens still to be computed, at most.
    outstanding_tokens: int
    tokens_per_s: float
    mean_acceptance_length: float
    #: What requests lately waited for a first token, the 90th percentile, or what the first in the queue has waited.
    time_to_first_token_s: float
