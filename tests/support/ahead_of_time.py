"""Compiling every kernel beside the tests, on what they leave of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parent.parent.parent


class AheadOfTime:
    """``python -m jetflow_kernels.aot`` at the lowest priority, from construction on."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(_ROOT / "kernels")
        command = ["nice", "-n", "19", sys.executable, "-m", "jetflow_kernels.aot"]
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name) / "out", Path(self._folder.name) / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            # A session of its own, so that its workers end with it.
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)

    def wait(self) -> tuple[int, list[str], str]:
        """Waits for the end: exit status, lines of the table, and the errors."""
        status = self._process.wait()
        return status, self._out.read_text().splitlines(), self._err.read_text()

    def close(self) -> None:
        """Ends what is left. Safe to call twice."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._folder.cleanup()
