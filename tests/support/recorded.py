"""Metrics that remember what they were told."""

from __future__ import annotations

from collections import Counter, defaultdict

from jetflow_cluster.metrics import COUNTER, GAUGE, HISTOGRAM, Metric


class RecordedMetrics:
    """All values by name, and labels of each; refuses what the catalogue does not allow."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.observed: dict[str, list[float]] = defaultdict(list)

    @property
    def names(self) -> set[str]:
        return set(self.counts) | set(self.gauges) | set(self.observed)

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        assert metric.kind == COUNTER and value >= 0
        self._check(metric, labels)
        self.counts[metric.name] += value
        for label in labels.values():
            self.counts[f"{metric.name}/{label}"] += value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric.kind == GAUGE
        self._check(metric, labels)
        self.gauges[metric.name] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric.kind == HISTOGRAM and value >= 0
        self._check(metric, labels)
        self.observed[metric.name].append(value)

    @staticmethod
    def _check(metric: Metric, labels: dict[str, str]) -> None:
        assert tuple(labels) == metric.labels
