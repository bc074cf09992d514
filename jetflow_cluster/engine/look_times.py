"""When the policy looks at a load anew: seldom, where nothing can have changed."""

from __future__ import annotations

from jetflow_cluster.engine.protocols import DecodeLoad

#: Steps between two looks at an unchanged load: at first, and at most, where the load is the reason not to draft.
_OFTEN, _SELDOM = 16, 64
#: Steps between two looks at what a better head could do, where the load is the reason.
_HOPE_EVERY = 128
#: Share of the load by which it must change to be looked at before its time.
_NEWS = 0.2


class LookTimes:
    """Counts steps, and remembers the load of the last look."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._every, self._next, self._next_hope = _OFTEN, 0, 0
        #: Decoding requests at the last look, and the latest arrival among them.
        self._num_decoding, self._newest = 0, -1

    @property
    def is_due(self) -> bool:
        """Whether it is time, whatever the load."""
        return self.num_steps >= self._next

    def is_news(self, load: DecodeLoad, *, is_on: bool, expects_others: bool) -> bool:
        """Whether a load asks for a look at once.

        Args:
            load: the present one.
            is_on: whether drafting is on; where it is not, a load that rises is no news.
            expects_others: whether other requests may be worth more than those that were looked at.
        """
        fell = load.num_decoding < (1.0 - _NEWS) * self._num_decoding
        if is_on:
            return fell or load.num_decoding > (1.0 + _NEWS) * self._num_decoding
        return fell or (expects_others and _newest(load) > self._newest)

    def looked(self, load: DecodeLoad, *, is_seldom: bool) -> None:
        """A look was taken; the next is later than the last where `is_seldom`."""
        self._num_decoding, self._newest = load.num_decoding, _newest(load)
        self._every = min(2 * self._every, _SELDOM) if is_seldom else _OFTEN
        self._next = self.num_steps + self._every

    def takes_hope(self) -> bool:
        """Whether it is time to look at what a better head could do; if so, it is taken to be done."""
        if self.num_steps < self._next_hope:
            return False
        self._next_hope = self.num_steps + _HOPE_EVERY
        return True


def _newest(load: DecodeLoad) -> int:
    return load.requests[-1].arrival if load.requests else -1
