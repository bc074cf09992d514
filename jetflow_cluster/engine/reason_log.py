"""Why mode ``auto`` speculates or does not, in the log: a line where the reason changes, and not too many."""

from __future__ import annotations

import logging
import math
import time

_log = logging.getLogger(__name__)

#: Seconds between two lines about the same.
_EVERY_S = 60.0
#: Accepted guesses of its largest trees below which a head is worth a warning: better ones only meet too high a load.
_POOR = 0.5
#: What the reasons mean.
REASONS = {
    "pays": "it pays",
    "load": "steps are too full",
    "pace": "steps with trees were slower than those without",
    "head": "guesses are worth too little; they are tried again in a hundredth of the time",
}


class ReasonLog:
    """Remembers when each reason was told last."""

    def __init__(self) -> None:
        self._told_s: dict[str, float] = {}

    def tell(self, reason: str, ratio: float, most: float, levels: tuple[float, float]) -> None:
        """A reason that was another one before.

        Args:
            reason: a key of `REASONS`.
            ratio: best expected tokens per second over those of no speculation.
            most: accepted guesses of the head's largest trees at warm-up.
            levels: of gains over those of warm-up, greedy and sampled.
        """
        now = time.monotonic()
        if now - self._told_s.get(reason, -math.inf) < _EVERY_S:
            return
        self._told_s[reason] = now
        message = (
            "speculation is %s (%s): at best %.2f times the tokens per second of none; "
            "at warm-up %.2f of the head's guesses accepted at most, gains at %.2f greedy, %.2f sampled of warm-up's"
        )
        is_poor = reason == "head" and most * min(levels) < _POOR
        level = logging.WARNING if is_poor else logging.INFO
        _log.log(level, message, "on" if reason == "pays" else "off", REASONS[reason], ratio, most, *levels)
