"""From measurements to rows: medians, and medians of ratios within a prompt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Systems that the others are compared with, and the key of the ratio in a row.
BASELINES = {
    "off": "ratio_to_off",
    "transformers": "ratio_to_transformers",
    "transformers prompt lookup": "ratio_to_prompt_lookup",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed completion of a batch of prompts."""

    #: Wall time, prompt processing included.
    seconds: float
    #: Output tokens of each prompt.
    token_ids: list[list[int]]
    #: Mean tokens per target pass and request behind the first token; 1 without speculation.
    mean_acceptance_length: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the whole batch per second."""
        return sum(len(ids) for ids in self.token_ids) / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of one system, beside those of the other systems on the same prompts."""

    #: ``fp32`` and the like.
    dtype: str
    batch_size: int
    system: str
    #: Names of the prompts of the batch.
    prompts: tuple[str, ...]
    run: Run
    #: The runs of all systems on these prompts, this one included.
    runs: Mapping[str, Run] = field(repr=False)

    def ratio_to(self, baseline: str) -> float | None:
        """How many times faster than `baseline` on the same prompts; None when that did not run."""
        other = self.runs.get(baseline)
        return None if other is None else self.run.tokens_per_s / other.tokens_per_s

    @property
    def num_same_outputs(self) -> int:
        """Prompts whose output tokens equal those without speculation."""
        plain = self.runs.get("off", self.run).token_ids
        return sum(a == b for a, b in zip(self.run.token_ids, plain, strict=True))

    def as_sample(self) -> dict[str, Any]:
        """The run as plain JSON values."""
        return {
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "system": self.system,
            "prompts": list(self.prompts),
            "seconds": round(self.run.seconds, 6),
            "tokens_per_s": round(self.run.tokens_per_s, 3),
            "mean_acceptance_length": round(self.run.mean_acceptance_length, 4),
            "num_same_outputs": self.num_same_outputs,
        }


def make_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One row per dtype, batch size and system, in the order of their first measurement."""
    groups: dict[tuple[str, int, str], list[Measurement]] = {}
    for measurement in measurements:
        key = (measurement.dtype, measurement.batch_size, measurement.system)
        groups.setdefault(key, []).append(measurement)
    return [_row(*key, group) for key, group in groups.items()]


def _row(dtype: str, batch_size: int, system: str, group: Sequence[Measurement]) -> dict[str, Any]:
    speeds = [measurement.run.tokens_per_s for measurement in group]
    row: dict[str, Any] = {
        "name": f"{system}, {dtype}, batch {batch_size}",
        "system": system,
        "dtype": dtype,
        "batch_size": batch_size,
        "num_runs": len(group),
        "tokens_per_s": round(statistics.median(speeds), 2),
    }
    for baseline, key in BASELINES.items():
        ratios = [ratio for m in group if (ratio := m.ratio_to(baseline)) is not None]
        row[key] = round(statistics.median(ratios), 4) if ratios else None
        if key == "ratio_to_off":
            row["ratio_to_off_quartiles"] = _quartiles(ratios)
    lengths = [measurement.run.mean_acceptance_length for measurement in group]
    row["mean_acceptance_length"] = round(statistics.fmean(lengths), 4)
    num_prompts = sum(len(measurement.prompts) for measurement in group)
    row["share_same_outputs"] = round(sum(m.num_same_outputs for m in group) / num_prompts, 4)
    return row


def _quartiles(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]
