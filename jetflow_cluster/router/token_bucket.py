"""How much a caller may use in the long run, and at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds' worth that may be used at once.
BURST_S = 10.0


@dataclass(frozen=True)
class Bucket:
    """What is left of an allowance. It fills at `rate` per second up to `BURST_S` seconds' worth, at least 1."""

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """A full one."""
        return cls(rate, _most(rate), now)

    def filled(self, now: float) -> Bucket:
        """The bucket at a later moment."""
        level = min(_most(self.rate), self.level + max(0.0, now - self.at) * self.rate)
        return Bucket(self.rate, level, max(now, self.at))

    def less(self, amount: float, now: float) -> Bucket:
        """The bucket when an amount was used; it may fall below zero, which is then made up for first."""
        filled = self.filled(now)
        return Bucket(self.rate, filled.level - amount, filled.at)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much is there, 0 when it is; an amount above the most counts as the most."""
        missing = min(amount, _most(self.rate)) - self.filled(now).level
        return max(0.0, missing / self.rate)


def _most(rate: float) -> float:
    return max(1.0, rate * BURST_S)
