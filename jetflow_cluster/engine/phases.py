"""Which phase a start is in, and how long each one took."""

from __future__ import annotations

import time


class Phases:
    """Seconds by phase, in the order in which they began. One thread begins and ends them; any may read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """Ends the phase before. A phase that begins again goes on with its seconds."""
        self.end()
        self._running = (name, time.monotonic())

    def end(self) -> None:
        """Ends the phase that runs, if one does."""
        running, self._running = self._running, None
        if running is not None:
            name, since = running
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - since

    @property
    def current(self) -> str:
        """The phase that runs; empty between phases."""
        running = self._running
        return running[0] if running is not None else ""

    @property
    def seconds(self) -> dict[str, float]:
        """Of the phases that ended."""
        return dict(self._seconds)
