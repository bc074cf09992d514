"""What one request's guesses were worth against what was promised."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jetflow_cluster.tree.build import SCORE_UNIT

#: Promised tokens that a worth of 1 counts for before anything is known.
_PRIOR = 4.0
#: What is left of a step's weight after each later one that drafted, and after each that did not.
_FADE_DRAFTED, _FADE_IDLE = 0.93, 0.995
#: Bounds of the worth.
_LEAST, _MOST = 0.05, 1.6


@dataclass(kw_only=True)
class Worth:
    """Decayed sums of accepted and promised tokens."""

    accepted: float = 0.0
    promised: float = 0.0

    @property
    def value(self) -> float:
        """Accepted over promised, drawn towards 1."""
        return min(max((_PRIOR + self.accepted) / (_PRIOR + self.promised), _LEAST), _MOST)

    @property
    def bias(self) -> int:
        """The same as a bias of scores, fixed point."""
        return round(math.log(self.value) * SCORE_UNIT)

    def drafted(self, accepted: float, promised: float) -> None:
        """A tree that promised so much."""
        self.accepted = _FADE_DRAFTED * self.accepted + accepted
        self.promised = _FADE_DRAFTED * self.promised + promised

    def rested(self, num_steps: int = 1) -> None:
        """Steps without drafting: what is known grows old."""
        fade = _FADE_IDLE**num_steps
        self.accepted, self.promised = fade * self.accepted, fade * self.promised
