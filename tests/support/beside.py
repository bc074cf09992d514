"""Commands that go on beside the tests, on what these leave of the machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread


@dataclass(frozen=True, kw_only=True)
class Command:
    """Something to run."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How it ended."""

    status: int
    output: str
    errors: str


class Beside:
    """Runs commands at the lowest priority, two at a time and in their order, from construction on."""

    def __init__(self, commands: Sequence[Command]):
        self._found: dict[str, Ended] = {}
        self._done = {command.name: Event() for command in commands}
        self._running: set[int] = set()
        self._is_closed = False
        self._lock = Lock()
        self._waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
        for command in commands:
            self._waiting.put(command)
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def wait(self, name: str) -> Ended:
        """Waits for the end of one."""
        self._done[name].wait()
        return self._found[name]

    def close(self) -> None:
        """Ends what is left."""
        with self._lock:
            self._is_closed = True
            for leader in self._running:
                os.killpg(leader, signal.SIGKILL)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                command = self._waiting.get_nowait()
            except queue.Empty:
                return
            with tempfile.TemporaryDirectory() as folder:
                self._run_one(command, Path(folder))

    def _run_one(self, command: Command, folder: Path) -> None:
        with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors, self._lock:
            if self._is_closed:
                return
            # A group of its own, so that its workers end with it. In a session of its own it would not be below the
            # tests: Linux shares a machine out among sessions first, and looks at priorities within each.
            process = subprocess.Popen(
                ["nice", "-n", "19", *command.arguments],
                env=command.environment,
                stdout=output,
                stderr=errors,
                process_group=0,
            )
            self._running.add(process.pid)
        status = process.wait()
        with self._lock:
            self._running.discard(process.pid)
        texts = {name: (folder / name).read_text() for name in ("output", "errors")}
        self._found[command.name] = Ended(status=status, **texts)
        self._done[command.name].set()
