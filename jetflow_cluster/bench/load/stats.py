"""Medians of paired ratios, with bounds by the bootstrap."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class PairedRatio:
    """How a system compares with another one on the same rounds."""

    median: float
    #: Bounds of the median's central 90 % under resampled rounds.
    low: float
    high: float


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> PairedRatio:
    """Median of ``ours[i] / theirs[i]``, and the 5th and 95th percentile of that median over resampled rounds.

    Raises:
        ValueError: there is none, or the lengths differ.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} rounds: must be as many, and at least one")
    ratios = np.asarray(ours, dtype=np.float64) / np.asarray(theirs, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), size=(_NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.05, 0.95))
    return PairedRatio(median=statistics.median(ratios.tolist()), low=float(low), high=float(high))
