"""Threads that torch computes with on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from pathlib import Path

import torch

from jetflow_kernels.machine import machine

_PAUSE_SOFT = 1


def limit_compute_threads() -> None:
    """At most one thread for each core that belongs to this process: torch counts those of the machine, and threads
    beyond the quota of a control group are stopped in mid-step."""
    torch.set_num_threads(min(torch.get_num_threads(), machine().num_cores))


def release_compute_threads() -> None:
    """Ends the OpenMP threads that belong to the calling thread; they come back with its next parallel operation.

    Each thread that calls torch has such threads of its own, and keeps them. Where all together are more than the
    processors, GNU's OpenMP puts them to sleep at every barrier, and small operations take half as long again. So a
    thread that loaded a model and hands it to another one lets go of its own. Does nothing for other OpenMP libraries.
    """
    for library in _gnu_openmp():
        library.omp_pause_resource_all(_PAUSE_SOFT)


@cache
def _gnu_openmp() -> list[ctypes.CDLL]:
    """The libraries of that kind that this process has loaded."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
        for path in sorted(paths):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(path)
                _ = library.omp_pause_resource_all
                found.append(library)
    return found
