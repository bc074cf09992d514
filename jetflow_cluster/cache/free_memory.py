"""How much memory a device has to give."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

#: Mount points of control groups, version 2 and the memory controller of version 1.
_UNIFIED, _MEMORY_V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
#: By version: limit, use, and the line of ``memory.stat`` that tells of caches.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_memory_bytes(device: torch.device) -> int:
    """Memory of the device that can be had without swapping; on CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    groups = _own_groups(Path("/proc/self/cgroup"))
    return min(
        _host_memory_bytes(Path("/proc/meminfo")),
        container_memory_bytes(_UNIFIED, groups.get("", "/")),
        container_memory_bytes(_MEMORY_V1, groups.get("memory", "/"), version=1),
    )


def _host_memory_bytes(meminfo: Path) -> int:
    """What the kernel would give, caches that it can drop included."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _own_groups(path: Path) -> dict[str, str]:
    """This process's control group by controller; the empty name is version 2's."""
    try:
        entries = [line.split(":", 2) for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name: entry[2] for entry in entries if len(entry) == 3 for name in entry[1].split(",")}


def container_memory_bytes(mount: Path, group: str, *, version: int = 2) -> int:
    """Room under the limits of a control group and all those above it, file caches that can be dropped included.

    Args:
        mount: where the hierarchy, or the part of it that a container sees, is mounted.
        group: the process's group as ``/proc/self/cgroup`` names it. Within a container it may not be there: then
            what is mounted is the container's own.
        version: of the control groups, 1 or 2.

    Returns:
        Bytes, or the largest integer where nothing is limited.
    """
    folder = mount / group.lstrip("/")
    levels = [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
    return min((_room(level, *_FILES[version]) for level in levels), default=sys.maxsize)


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int:
    try:
        limit, usage = (int((group / name).read_text()) for name in (limit_name, usage_name))
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - usage + int(fields[cache_name]))
    except (OSError, KeyError, ValueError):
        return sys.maxsize
