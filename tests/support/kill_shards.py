"""``python -m support.kill_shards PID``: kills each shard that a process has Ray start, until that process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _below(pid: int) -> list[tuple[int, str]]:
    """Process ids and titles of all that descend from a process."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    found = {pid}
    while more := {int(own) for own, parent, _ in rows if int(parent) in found} - found:
        found |= more
    return [(int(own), title) for own, _, title in rows if int(own) in found]


def main(pid: int) -> None:
    """Returns when the process has ended."""
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        for own, title in _below(pid):
            if title.startswith("ray::ShardActor"):
                os.kill(own, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
