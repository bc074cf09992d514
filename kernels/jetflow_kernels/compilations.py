"""Counts compilations of kernels, of which none may happen while requests are served.

A kernel that triton loads from its cache on disk counts as well: a request would wait for it too.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

_log = logging.getLogger(__name__)


class _Counter:
    """State of this process."""

    is_watching = False
    total = 0
    at_readiness: int | None = None


def watch() -> None:
    """Counts from now on; needed once. Does nothing without triton."""
    if _Counter.is_watching or importlib.util.find_spec("triton") is None:
        return
    from triton import knobs

    previous = knobs.runtime.jit_post_compile_hook

    def hook(*args: Any, **kwargs: Any) -> Any:
        function = kwargs.get("fn")
        if str(getattr(function, "module", "")).startswith("jetflow_kernels."):
            _note(str(kwargs.get("repr", getattr(function, "name", ""))))
        return previous(*args, **kwargs) if previous is not None else None

    knobs.runtime.jit_post_compile_hook = hook
    _Counter.is_watching = True


def _note(name: str) -> None:
    _Counter.total += 1
    if _Counter.at_readiness is not None:
        _log.warning("a kernel was compiled behind readiness: %s", name)


def mark_ready() -> None:
    """From now on a compilation is a fault: it is counted by `since_readiness` and logged as a warning."""
    _Counter.at_readiness = _Counter.total


def mark_loading() -> None:
    """Compilations are in order again, as when another engine is loaded."""
    _Counter.at_readiness = None


def total() -> int:
    """Compilations of this package's kernels in this process, since `watch`."""
    return _Counter.total


def since_readiness() -> int:
    """Of those, the ones since `mark_ready`; 0 before it."""
    return _Counter.total - _Counter.at_readiness if _Counter.at_readiness is not None else 0
