"""What an engine did in the last seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_NUM_BUCKETS = 8
_BUCKET_S = 0.5
#: How far `RecentWaits` looks back, and how many it keeps.
_LOOK_BACK_S, _NUM_WAITS = 10.0, 1024


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Means over the last seconds; 0 where nothing was done."""

    tokens_per_s: float
    #: Tokens per step and request, the bonus counted; prompts are no such steps.
    mean_acceptance_length: float


class RateMeter:
    """Counts by half seconds and keeps the last four. One thread adds; any thread may read."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        #: Number of the half second, and what it saw: tokens, steps of requests, accepted guesses.
        self._buckets: list[tuple[int, int, int, int]] = [(-1, 0, 0, 0)] * _NUM_BUCKETS

    def add(self, now_s: float, *, num_tokens: int, num_steps: int, num_accepted: int) -> None:
        """Counts what was done until now; `now_s` is a moment of `time.monotonic`."""
        index = int(now_s / _BUCKET_S)
        bucket = self._buckets[index % _NUM_BUCKETS]
        tokens, steps, accepted = bucket[1:] if bucket[0] == index else (0, 0, 0)
        self._buckets[index % _NUM_BUCKETS] = (index, tokens + num_tokens, steps + num_steps, accepted + num_accepted)

    def rates(self, now_s: float) -> Rates:
        """Means over the time that the buckets cover."""
        oldest = int(now_s / _BUCKET_S) - _NUM_BUCKETS + 1
        recent = [bucket for bucket in self._buckets if bucket[0] >= oldest]
        tokens, steps, accepted = (sum(bucket[part] for bucket in recent) for part in (1, 2, 3))
        covered_s = max(now_s - max(oldest * _BUCKET_S, self._began_s), _BUCKET_S)
        return Rates(tokens_per_s=tokens / covered_s, mean_acceptance_length=1.0 + accepted / steps if steps else 0.0)


class RecentWaits:
    """How long requests waited, of the last seconds. One thread adds; any thread may read."""

    def __init__(self) -> None:
        self._waits: deque[tuple[float, float]] = deque(maxlen=_NUM_WAITS)

    def add(self, now_s: float, wait_s: float) -> None:
        """Notes one that ended now."""
        self._waits.append((now_s, wait_s))

    def p90(self, now_s: float) -> float:
        """The 90th percentile; 0 when nobody waited lately."""
        recent = sorted(wait_s for moment_s, wait_s in list(self._waits) if now_s - moment_s <= _LOOK_BACK_S)
        return recent[len(recent) * 9 // 10] if recent else 0.0
