"""Metrics by way of Ray, whose nodes export them to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from jetflow_cluster.metrics import CATALOGUE, COUNTER, GAUGE, Metric


class RayMetrics:
    """Takes values of the catalogue; see `jetflow_cluster.metrics.Metrics`.

    Args:
        tags: on every value, such as the replica's name.
    """

    def __init__(self, tags: Mapping[str, str]):
        self._instruments: dict[str, Any] = {metric.name: _instrument(metric, tags) for metric in CATALOGUE}

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Counts; nothing is told of 0."""
        if value:
            self._instruments[metric.name].inc(value, tags=labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """The present value of a gauge."""
        self._instruments[metric.name].set(value, tags=labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One observation of a histogram."""
        self._instruments[metric.name].observe(value, tags=labels)


def _instrument(metric: Metric, tags: Mapping[str, str]) -> Any:
    keys = (*tags, *metric.labels)
    instrument: Any
    if metric.kind == COUNTER:
        instrument = ray_metrics.Counter(metric.name, description=metric.description, tag_keys=keys)
    elif metric.kind == GAUGE:
        instrument = ray_metrics.Gauge(metric.name, description=metric.description, tag_keys=keys)
    else:
        bounds = list(metric.buckets)
        instrument = ray_metrics.Histogram(
            metric.name, description=metric.description, boundaries=bounds, tag_keys=keys
        )
    instrument.set_default_tags(dict(tags))
    return instrument
