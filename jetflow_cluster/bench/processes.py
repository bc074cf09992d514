"""Processor time of a command and of all processes that it started, read from ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: What distinguishes a process: the beginning of its title, or a part of its command line.
_KINDS: Mapping[str, str] = {
    "ray::ShardActor": "shards",
    "ray::DraftActor": "draft workers",
    "EngineReplica": "replicas",
    "Router": "routers",
    "Directory": "directory",
    "ServeController": "Serve's controller",
}


def cpu_seconds(pid: int) -> dict[str, float]:
    """Seconds by kind of process, of `pid` and all that descend from it, ended children included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            # It may end meanwhile.
            with suppress(OSError):
                # Behind the name, which may hold anything: state, parent, and from the twelfth field on the times.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    found: dict[str, float] = {}
    for each in parents:
        if _descends(each, pid, parents):
            kind = "command" if each == pid else _kind(each)
            found[kind] = found.get(kind, 0.0) + ticks[each] / _TICKS_PER_S
    return found


def _descends(each: int, pid: int, parents: Mapping[int, int]) -> bool:
    while each and each != pid:
        each = parents.get(each, 0)
    return each == pid


def _kind(pid: int) -> str:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for part, kind in _KINDS.items():
            if part in line:
                return kind
        if "cc1" in line or "cpu_kernels" in line:
            return "compiler"
    return "Ray"
