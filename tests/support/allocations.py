"""What torch's CPU allocator gave out while something ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Allocations:
    """Bytes beyond what was allocated before."""

    peak: int
    left: int


def allocations_of(work: Callable[[], object]) -> Allocations:
    """Runs `work` and counts every allocation and release within it; its result is dropped at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    current = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    del kept
    return Allocations(peak=peak, left=current)
