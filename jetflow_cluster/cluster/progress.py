"""Shows live what the start of a cluster is at, and says at its end where the time went. Loads Ray only to ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.status import Status

from jetflow_cluster.engine.phases import Phases

#: Seconds between looks at the replicas that start.
_LOOK_S = 0.5


class StartProgress:
    """A line that follows a start, on a terminal; elsewhere a line for each change. A context manager, within which the
    line is there.

    Args:
        console: where it is shown.
        note: is said beside each phase.
    """

    def __init__(self, console: Console, note: str = ""):
        self._console, self._note = console, note
        self._phases = Phases()
        self._began = time.monotonic()
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._shown = ""
        self._lock = threading.Lock()

    def __enter__(self) -> StartProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def begin(self, phase: str) -> None:
        """Shows the next phase, and ends the one before."""
        self._phases.begin(phase)
        self._show(phase)

    @contextmanager
    def following_replicas(self, phase: str) -> Iterator[None]:
        """Within it the phases of the replicas that start are shown."""
        self.begin(phase)
        ended = threading.Event()
        thread = threading.Thread(target=self._follow, args=(phase, ended), name="start-progress", daemon=True)
        thread.start()
        try:
            with self:
                yield
        finally:
            ended.set()
            thread.join()
            self._phases.end()

    def summary(self, replicas: Mapping[str, Mapping[str, Any]]) -> str:
        """Where the time went.

        Args:
            replicas: of `launch.overview`; of the one whose start took longest, its phases are named.
        """
        started: list[dict[str, float]] = [replica["phases"] for replica in replicas.values()]
        phases = max(started, key=lambda each: sum(each.values()), default={})
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self._phases.seconds.items()]
        longest = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05)
        of_replica = f"; of these a replica {sum(phases.values()):.1f} s ({longest})" if longest else ""
        return f"started in {time.monotonic() - self._began:.1f} s: {', '.join(parts)}{of_replica}"

    def _follow(self, phase: str, ended: threading.Event) -> None:
        from jetflow_cluster.cluster import launch

        while not ended.wait(_LOOK_S):
            # Nobody may be there yet to answer.
            with suppress(Exception):
                found = launch.starting()
                if found and not ended.is_set():
                    phases = ", ".join(f"replica {name}: {each}" for name, each in sorted(found.items()))
                    self._show(f"{phase}: {phases}")

    def _show(self, text: str) -> None:
        text = f"{text}{self._note}"
        with self._lock:
            if text == self._shown:
                return
            self._shown = text
            if self._status is not None:
                self._status.update(text)
            else:
                self._console.print(f"{time.monotonic() - self._began:5.1f} s  {text}", highlight=False, markup=False)
