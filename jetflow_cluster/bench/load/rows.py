"""From samples to rows: one per level and system."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jetflow_cluster.bench.load.stats import PairedRatio, paired_ratio

Sample = Mapping[str, Any]


def make_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows in the order of loop, level, and a system's first sample.

    Systems are compared by all requests' tokens per second in a closed loop. In an open one that follows the arrivals,
    so they are compared by the speed of one request.
    """
    groups: dict[tuple[str, float], dict[str, dict[int, Sample]]] = {}
    for sample in samples:
        systems = groups.setdefault((sample["loop"], sample["level"]), {})
        systems.setdefault(sample["system"], {})[sample["round"]] = sample
    rows = []
    for (loop, level), systems in sorted(groups.items(), key=lambda item: item[0]):
        measure = "tokens_per_s" if loop == "closed" else "request_tokens_per_s"
        best = _best_fixed(systems, measure)
        for name, rounds in systems.items():
            rows.append(_row(loop, level, name, rounds, systems, measure, best))
    return rows


def is_fixed(system: str) -> bool:
    """Whether a system's name is a fixed number of nodes."""
    return system.isdigit()


def _best_fixed(systems: Mapping[str, Mapping[int, Sample]], measure: str) -> str | None:
    """The fixed budget that was fastest at the median."""
    fixed = {name: rounds for name, rounds in systems.items() if is_fixed(name)}
    return max(fixed, key=lambda name: _median(fixed[name].values(), measure), default=None)


def _row(
    loop: str,
    level: float,
    name: str,
    rounds: Mapping[int, Sample],
    systems: Mapping[str, Mapping[int, Sample]],
    measure: str,
    best: str | None,
) -> dict[str, Any]:
    found = list(rounds.values())
    lengths = [s["mean_acceptance_length"] for s in found if s["mean_acceptance_length"] is not None]
    shares = [share for s in found if (share := s.get("planning_share")) is not None]
    row: dict[str, Any] = {
        "name": f"{name}, {level:g} at a time" if loop == "closed" else f"{name}, {loop} {level:g}/s",
        "system": name,
        "loop": loop,
        "level": level,
        "num_rounds": len(found),
        "tokens_per_s": round(_median(found, "tokens_per_s"), 2),
        "request_tokens_per_s": round(_median(found, "request_tokens_per_s"), 2),
        "first_s": round(_median(found, "first_s"), 5),
        "first_p95_s": round(_median(found, "first_p95_s"), 5),
        "mean_acceptance_length": round(statistics.fmean(lengths), 4) if lengths else None,
        "planning_share": round(statistics.median(shares), 5) if shares else None,
        "share_same_outputs": round(
            sum(s["num_same_outputs"] for s in found) / sum(s["num_requests"] for s in found), 4
        ),
    }
    for key, other in (("off", "off"), ("best_fixed", best), ("transformers", "transformers")):
        ratio = _ratio(rounds, systems.get(other, {}) if other is not None else {}, measure)
        row[f"ratio_to_{key}"] = round(ratio.median, 4) if ratio else None
        row[f"ratio_to_{key}_bounds"] = [round(ratio.low, 4), round(ratio.high, 4)] if ratio else None
    row["best_fixed"] = best
    return row


def _ratio(ours: Mapping[int, Sample], theirs: Mapping[int, Sample], measure: str) -> PairedRatio | None:
    both = [index for index in ours if index in theirs]
    if not both:
        return None
    return paired_ratio([ours[i][measure] for i in both], [theirs[i][measure] for i in both])


def _median(samples: Any, key: str) -> float:
    return float(statistics.median(sample[key] for sample in samples))
