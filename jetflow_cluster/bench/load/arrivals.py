"""When requests arrive: as others end (closed loop), by a Poisson process, or as a recorded trace says."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The trace that is shipped; `jetflow bench trace` writes it again.
BURSTY_TRACE = Path(__file__).parent / "bursty_trace.json"


@dataclass(frozen=True, kw_only=True)
class BurstProcess:
    """A Poisson process whose rate jumps between two values, each kept for an exponentially distributed time.

    The rates are relative: the process as a whole has a mean of one arrival per unit of time, and whoever replays its
    trace chooses the unit. Raises ValueError naming field, value and limit.
    """

    #: Arrivals of the trace.
    num_arrivals: int = 256
    #: How many times as often requests arrive in a burst as in between.
    burst_factor: float = 8.0
    #: Mean arrivals of a quiet spell, and of a burst.
    mean_quiet: float = 8.0
    mean_burst: float = 16.0
    seed: int = 20_261_125

    def __post_init__(self) -> None:
        for name, low in (("num_arrivals", 2), ("burst_factor", 1.0), ("mean_quiet", 1.0), ("mean_burst", 1.0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")

    def arrivals(self) -> list[float]:
        """Moments, the first at 0, scaled so that they come one per unit of time on the whole."""
        rng = random.Random(self.seed)
        moments: list[float] = []
        now, is_burst = 0.0, False
        while len(moments) < self.num_arrivals:
            rate, mean = (self.burst_factor, self.mean_burst) if is_burst else (1.0, self.mean_quiet)
            ends = now + rng.expovariate(rate / mean)
            while (now := now + rng.expovariate(rate)) < ends and len(moments) < self.num_arrivals:
                moments.append(now)
            # Without memory, what is left of the last wait is no wait of the next rate.
            now, is_burst = ends, not is_burst
        first, span = moments[0], moments[-1] - moments[0]
        return [round((moment - first) * (self.num_arrivals - 1) / span, 4) for moment in moments]


def write_trace(process: BurstProcess, path: Path) -> dict[str, Any]:
    """Writes the process and its arrivals as JSON, and returns that."""
    trace = {"process": asdict(process), "unit": "mean time between arrivals", "arrivals": process.arrivals()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace) + "\n", encoding="utf-8")
    return trace


def read_trace(path: Path) -> list[float]:
    """The arrivals of a trace: non-negative, non-decreasing.

    Raises:
        ValueError: the file is no trace.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    moments = content.get("arrivals") if isinstance(content, Mapping) else None
    if not isinstance(moments, list) or not moments:
        raise ValueError(f"trace: {path} has no list `arrivals`")
    values = [float(moment) for moment in moments]
    if values[0] < 0 or any(b < a for a, b in pairwise(values)):
        raise ValueError(f"trace: the arrivals of {path} must not be negative, and must not decrease")
    return values


def poisson_arrivals(num: int, per_s: float, seed: int) -> list[float]:
    """Seconds at which so many requests arrive, the first at 0."""
    rng = random.Random(seed)
    moments = [0.0]
    for _ in range(num - 1):
        moments.append(moments[-1] + rng.expovariate(per_s))
    return moments


def trace_arrivals(trace: list[float], num: int, per_s: float) -> list[float]:
    """The first arrivals of a trace, repeated where it is too short, at so many per second on the whole."""
    span = trace[-1] + (trace[-1] - trace[0]) / max(1, len(trace) - 1)
    return [(trace[i % len(trace)] + span * (i // len(trace))) / per_s for i in range(num)]
