"""A load that rises and falls: requests at a time as a function of time, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class RampProfile:
    """Requests at a time: up and down again, in steps of equal length. Raises ValueError naming field, value, limit."""

    #: Requests at a time of each step on the way up; on the way down the same, the other way round.
    levels: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    #: Seconds of each step.
    level_s: float = 4.0

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 1 or any(b <= a for a, b in pairwise(self.levels)):
            raise ValueError(f"levels = {self.levels}: must be at least 1, and increase")
        if self.level_s <= 0:
            raise ValueError(f"level_s = {self.level_s}: must be above 0")

    @property
    def steps(self) -> tuple[int, ...]:
        """Up and down."""
        return (*self.levels, *self.levels[-2::-1])

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return len(self.steps) * self.level_s

    def at(self, now_s: float) -> int:
        """Requests at a time at a moment."""
        return self.steps[min(int(now_s / self.level_s), len(self.steps) - 1)]


@dataclass(frozen=True, kw_only=True)
class StepSeen:
    """One step: when it ended, what it gave, how it was filled."""

    ended_s: float
    num_tokens: int
    num_decoding: int
    #: Rows of the decoding requests' trees, roots included.
    num_rows: int
    #: Seconds that it took, and that the same requests would have taken for as many tokens without speculation; zeros
    #: where that is not known.
    took_s: float = 0.0
    off_s: float = 0.0


class RampedEngine(Protocol):
    """What can be put under a ramp."""

    @property
    def num_active(self) -> int:
        """Requests that run or wait."""

    def add(self) -> None:
        """One more request."""

    def step(self) -> StepSeen:
        """One step, at the end of which its clock stands."""


@dataclass(kw_only=True)
class RampRun:
    """All steps of one run."""

    profile: RampProfile
    steps: list[StepSeen] = field(default_factory=list)

    def windows(self, window_s: float) -> list[float]:
        """Tokens per second of each whole window; a step counts where it ended."""
        counts = [0] * int(self.profile.seconds / window_s)
        for step in self.steps:
            index = int(step.ended_s / window_s)
            if index < len(counts):
                counts[index] += step.num_tokens
        return [count / window_s for count in counts]

    def paired_ratios(self, window_s: float) -> list[float]:
        """Speed over that of the same requests without speculation, by window: what the same tokens would have taken
        over what they took."""
        off, took = ([0.0] * int(self.profile.seconds / window_s) for _ in range(2))
        for step in self.steps:
            index = int(step.ended_s / window_s)
            if index < len(off):
                off[index] += step.off_s
                took[index] += step.took_s
        return [a / b if b else 1.0 for a, b in zip(off, took, strict=True)]

    def nodes(self, window_s: float) -> list[float]:
        """Mean nodes per tree of each window."""
        rows, roots = ([0] * int(self.profile.seconds / window_s) for _ in range(2))
        for step in self.steps:
            index = int(step.ended_s / window_s)
            if index < len(rows):
                rows[index] += step.num_rows
                roots[index] += step.num_decoding
        return [r / n if n else 1.0 for r, n in zip(rows, roots, strict=True)]


def run_ramp(
    engine: RampedEngine, profile: RampProfile, *, on_step: Callable[[StepSeen], None] = lambda step: None
) -> RampRun:
    """Keeps as many requests active as the profile says; those that are too many finish and are not replaced."""
    run = RampRun(profile=profile)
    now_s = 0.0
    while now_s < profile.seconds:
        while engine.num_active < profile.at(now_s):
            engine.add()
        step = engine.step()
        now_s = step.ended_s
        run.steps.append(step)
        on_step(step)
    return run


@dataclass(frozen=True, kw_only=True)
class RampVerdict:
    """How `auto` did against `off` under the same ramp."""

    #: Tokens per second by window of two runs that know nothing of each other.
    auto: list[float]
    off: list[float]
    #: Speed of `auto` by window over that of the very same requests without speculation.
    ratios: list[float]
    #: Mean nodes per tree of `auto` by window.
    nodes: list[float]
    #: The least of `ratios`, and the least ratio of the two runs, whose requests begin and end at other moments.
    worst_ratio: float
    worst_apart: float
    #: Times that windows went from speculating to not, or back; a ramp across the crossing and back has two.
    num_turns: int

    @property
    def holds(self) -> bool:
        """No dip below 0.9, and no turn that the load did not make."""
        return self.worst_ratio >= 0.9 and self.num_turns <= 2


def judge(auto: RampRun, off: RampRun, *, window_s: float = 2.0) -> RampVerdict:
    """Compares two runs window by window."""
    ours, theirs, nodes = auto.windows(window_s), off.windows(window_s), auto.nodes(window_s)
    ratios = auto.paired_ratios(window_s)
    return RampVerdict(
        auto=ours,
        off=theirs,
        ratios=ratios,
        nodes=nodes,
        worst_ratio=min(ratios),
        worst_apart=min(a / b if b else 1.0 for a, b in zip(ours, theirs, strict=True)),
        num_turns=_turns(nodes),
    )


#: Nodes per tree below which a window does not speculate, and above which it does; between them it goes on as before.
_IDLE_NODES, _BUSY_NODES = 1.1, 1.5


def _turns(nodes: Sequence[float]) -> int:
    state, turns = nodes[0] >= _BUSY_NODES, 0
    for mean in nodes[1:]:
        now = mean >= _BUSY_NODES if not state else mean >= _IDLE_NODES
        turns += now is not state
        state = now
    return turns
