"""When each stage of the last steps ran."""

from __future__ import annotations

import os
import threading
import time
from typing import Any


class StageRing:
    """Begins and ends of stages in a fixed number of slots; a stage costs about a microsecond.

    One thread writes. Any thread may read: a slot is replaced as a whole, so a reader that is overtaken sees a stage
    more or less at the window's beginning.

    Args:
        num_slots: stages that are kept.
    """

    def __init__(self, num_slots: int):
        self._slots: list[tuple[str, int, int, int] | None] = [None] * num_slots
        self._count = 0
        self._stage, self._since_ns, self._step = "", 0, 0
        self._thread_id = 0
        # Stages are timed by a clock that never jumps, and told by one that processes and hosts share.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin_step(self, step: int) -> None:
        """The stages that follow are those of this step."""
        self._step = step

    def begin(self, stage: str) -> None:
        """A stage begins, and the one before it ends; an empty name is a pause."""
        now = time.perf_counter_ns()
        self._close(now)
        self._stage, self._since_ns = stage, now

    def end_step(self) -> None:
        """The last stage of a step ends."""
        self._close(time.perf_counter_ns())
        self._stage = ""

    def _close(self, now_ns: int) -> None:
        if self._stage:
            self._thread_id = threading.get_native_id()
            self._slots[self._count % len(self._slots)] = (self._stage, self._since_ns, now_ns, self._step)
            self._count += 1

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """Stages that ended within the last seconds, oldest first, as complete events of the Chrome trace format.

        ``ts`` is in microseconds since 1970, ``dur`` in microseconds; ``args.step`` numbers steps.
        """
        since_ns = time.perf_counter_ns() - int(seconds * 1e9)
        kept = sorted((slot for slot in self._slots if slot is not None and slot[2] >= since_ns), key=lambda s: s[1])
        return [
            {
                "name": stage,
                "cat": "step",
                "ph": "X",
                "ts": (begin_ns + self._epoch_ns) / 1e3,
                "dur": (end_ns - begin_ns) / 1e3,
                "pid": os.getpid(),
                "tid": self._thread_id,
                "args": {"step": step},
            }
            for stage, begin_ns, end_ns, step in kept
        ]
