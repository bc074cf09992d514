"""Tree speculation for large language models that changes no output token.

The public names load on first use: importing this package loads no torch, ray, grpc or triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jetflow_cluster.config import EngineConfig
    from jetflow_cluster.engine.local import LLM, AsyncLLM
    from jetflow_cluster.types import (
        EngineStats,
        FinishReason,
        GuessSource,
        InvalidRequestError,
        RequestDelta,
        RequestOutput,
        SamplingParams,
        SpeculationMode,
        SpeculationOptions,
        SpeculationStats,
        StepTree,
        TokenLogprobs,
        Usage,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "GuessSource",
    "InvalidRequestError",
    "RequestDelta",
    "RequestOutput",
    "SamplingParams",
    "SpeculationMode",
    "SpeculationOptions",
    "SpeculationStats",
    "StepTree",
    "TokenLogprobs",
    "Usage",
    "__version__",
]

_HOMES = {"LLM": "engine.local", "AsyncLLM": "engine.local", "EngineConfig": "config"}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'types')}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
