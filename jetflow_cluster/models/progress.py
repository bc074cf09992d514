"""Says how far the loading of weights is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)
#: Seconds between two lines.
_EVERY_S = 2.0


class LoadProgress:
    """Logs the share that is loaded, now and then and at the end.

    Args:
        what: is loaded, such as the checkpoint's folder.
        num_bytes: of all that this rank reads.
        clock: seconds.
    """

    def __init__(self, what: str, num_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._what, self._num_bytes, self._clock = what, num_bytes, clock
        self._done = 0
        self._began = self._told = clock()

    def loaded(self, num_bytes: int) -> None:
        """Counts what was read and put in place."""
        self._done += num_bytes
        now = self._clock()
        if now - self._told >= _EVERY_S and self._done < self._num_bytes:
            self._told = now
            self._say(now)

    def end(self) -> None:
        """All is there."""
        self._say(self._clock())

    def _say(self, now: float) -> None:
        share = 100 * self._done // self._num_bytes if self._num_bytes else 100
        what = f"{self._what}: {share} % of {self._num_bytes / 2**20:,.1f} MiB"
        _log.info("%s loaded in %.1f s", what, now - self._began)
