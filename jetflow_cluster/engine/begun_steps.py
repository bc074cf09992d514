"""What a policy decided for steps of whose outcome it is told later, behind its decisions on the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan


@dataclass(frozen=True, kw_only=True)
class BegunStep:
    """One step that was priced."""

    #: Of its plan, which they tell apart from others.
    items: tuple[ScheduledRequest, ...]
    #: Tokens of its decoding requests' prefixes.
    num_context_tokens: int = 0
    #: Rows that the draft head computed.
    num_draft_rows: int = 0
    #: Decoding requests that were left out, as half of all is guessed for meanwhile, and tokens of their prefixes.
    num_resting: int = 0
    num_resting_context_tokens: int = 0
    #: Accepted tokens that were foretold of the requests that draft, by their identity.
    foretold: Mapping[int, float] = field(default_factory=dict)
    #: Steps like it that it stands for, itself included.
    num_steps: int = 1


class BegunSteps:
    """The present step, and the one before it."""

    def __init__(self) -> None:
        self._steps: deque[BegunStep] = deque(maxlen=2)

    def note(self, step: BegunStep) -> None:
        """A step begins."""
        self._steps.append(step)

    def of(self, plan: StepPlan) -> BegunStep | None:
        """What is known of a plan's step; None where it was not noted."""
        return next((step for step in self._steps if step.items is plan.items), None)
