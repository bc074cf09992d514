"""The dashboard: which figures it shows, as Grafana's file and from scraped values alike.

``python -m jetflow_cluster.bench.panels`` writes deploy/grafana/jetflow.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetflow_cluster import metrics as m
from jetflow_cluster.metrics import HISTOGRAM, Metric

RATE, VALUE, MEAN, QUANTILE, RATIO = "rate", "value", "mean", "quantile", "ratio"
_WINDOW = "$__rate_interval"

#: Values of one scrape: by exported name and labels.
Scrape = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one per value of a label, of a panel."""

    legend: str
    #: ``rate`` per second, ``value`` (the sum), ``mean``, ``quantile`` of a histogram, or ``ratio`` of two rates.
    kind: str
    metric: Metric
    by: str = ""
    quantile: float = 0.0
    over: Metric | None = None
    offset: float = 0.0

    @property
    def expression(self) -> str:
        """As PromQL."""
        by = f" by ({self.by})" if self.by else ""
        name = self.metric.exported
        if self.kind == QUANTILE:
            return f"histogram_quantile({self.quantile}, sum by (le) (rate({name}_bucket[{_WINDOW}])))"
        if self.kind == RATIO:
            assert self.over is not None
            below = f"sum(rate({self.over.exported}[{_WINDOW}]))"
            value = f"sum{by} (rate({name}[{_WINDOW}])) / scalar({below})"
            return f"{self.offset:g} + {value}" if self.offset else value
        if self.kind == RATE:
            return f"sum{by} (rate({name}[{_WINDOW}]))"
        return f"{'sum' if self.kind == VALUE else 'avg'}{by} ({name})"

    def values(self, before: Scrape, now: Scrape, seconds: float) -> dict[str, float]:
        """By legend, from two scrapes so many seconds apart; empty where there is nothing to tell."""
        name = self.metric.exported
        if self.kind == QUANTILE:
            found = _quantile(_sums(before, f"{name}_bucket", "le"), _sums(now, f"{name}_bucket", "le"), self.quantile)
            return {} if found is None else {self.legend: found}
        current = _sums(now, name, self.by)
        if self.kind in (VALUE, MEAN):
            count = 1 if self.kind == VALUE else max(1, sum(key[0] == name for key in now))
            return {self._name(key): value / count for key, value in current.items()}
        earlier = _sums(before, name, self.by)
        changes = {key: value - earlier.get(key, 0.0) for key, value in current.items()}
        if self.kind == RATE:
            return {self._name(key): change / seconds for key, change in changes.items()}
        assert self.over is not None
        below = sum(_sums(now, self.over.exported, "").values()) - sum(_sums(before, self.over.exported, "").values())
        return {self._name(key): self.offset + change / below for key, change in changes.items()} if below > 0 else {}

    def _name(self, key: str) -> str:
        return self.legend.replace("{{" + self.by + "}}", key) if self.by else self.legend


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure."""

    title: str
    unit: str
    series: tuple[Series, ...]


def _rate(legend: str, metric: Metric, by: str = "") -> Series:
    return Series(legend=legend, kind=RATE, metric=metric, by=by)


def _value(legend: str, metric: Metric) -> Series:
    return Series(legend=legend, kind=VALUE, metric=metric)


def _mean(legend: str, metric: Metric) -> Series:
    return Series(legend=legend, kind=MEAN, metric=metric)


def _quantiles(metric: Metric) -> tuple[Series, ...]:
    assert metric.kind == HISTOGRAM
    return tuple(
        Series(legend=f"p{100 * quantile:g}", kind=QUANTILE, metric=metric, quantile=quantile)
        for quantile in (0.5, 0.9, 0.99)
    )


def _ratio(legend: str, metric: Metric, over: Metric, by: str = "", offset: float = 0.0) -> Series:
    return Series(legend=legend, kind=RATIO, metric=metric, over=over, by=by, offset=offset)


PANELS: tuple[Panel, ...] = (
    Panel(title="Requests", unit="reqps", series=(_rate("{{finished_reason}}", m.REQUEST_SUCCESS, "finished_reason"),)),
    Panel(
        title="Tokens",
        unit="ops",
        series=(_rate("generated", m.GENERATION_TOKENS), _rate("prompt", m.PROMPT_TOKENS)),
    ),
    Panel(title="Time to first token", unit="s", series=_quantiles(m.TIME_TO_FIRST_TOKEN)),
    Panel(title="Inter-token latency", unit="s", series=_quantiles(m.INTER_TOKEN_LATENCY)),
    Panel(title="Request latency", unit="s", series=_quantiles(m.E2E_LATENCY)),
    Panel(title="Time in queues", unit="s", series=_quantiles(m.QUEUE_TIME)),
    Panel(
        title="Requests in the engines",
        unit="short",
        series=(_value("running", m.RUNNING), _value("waiting", m.WAITING), _value("in routers", m.ROUTER_RUNNING)),
    ),
    Panel(title="Waiting in routers", unit="short", series=(_value("requests", m.ROUTER_WAITING),)),
    Panel(
        title="Tokens still to be computed",
        unit="short",
        series=(_value("in engines", m.OUTSTANDING_TOKENS), _value("waiting in routers", m.ROUTER_WAITING_TOKENS)),
    ),
    Panel(
        title="KV pages",
        unit="percentunit",
        series=(_mean("used", m.KV_USAGE), _mean("kept for prefixes", m.KV_CACHED)),
    ),
    Panel(
        title="Prompt tokens found in the prefix cache",
        unit="percentunit",
        series=(_ratio("share", m.PREFIX_HITS, m.PREFIX_QUERIES),),
    ),
    Panel(
        title="Tokens per tree",
        unit="short",
        series=(_ratio("acceptance length", m.NUM_ACCEPTED, m.NUM_DRAFTS, offset=1.0),),
    ),
    Panel(
        title="Trees accepted to a depth",
        unit="percentunit",
        series=(_ratio("{{position}}", m.NUM_ACCEPTED_PER_POS, m.NUM_DRAFTS, "position"),),
    ),
    Panel(
        title="Nodes",
        unit="ops",
        series=(_rate("verified", m.NODES_VERIFIED), _rate("guessed", m.NUM_DRAFT_TOKENS)),
    ),
    Panel(title="Nodes per request and step", unit="short", series=(_mean("tree budget", m.TREE_BUDGET),)),
    Panel(title="Why mode auto speculates or not", unit="ops", series=(_rate("{{reason}}", m.POLICY_STEPS, "reason"),)),
    Panel(
        title="Replicas",
        unit="short",
        series=(_mean("seen by a router", m.ROUTER_REPLICAS), _value("speculating", m.SPECULATING)),
    ),
    Panel(
        title="Steps",
        unit="ops",
        series=(_rate("steps", m.STEPS), _rate("preemptions", m.PREEMPTIONS)),
    ),
    Panel(
        title="Resumes, cancels, failures",
        unit="ops",
        series=(
            _rate("resumes", m.REQUEST_RESUMES),
            _rate("cancelled: {{cause}}", m.REQUEST_CANCELS, "cause"),
            _rate("failed: {{code}}", m.REQUEST_FAILURES, "code"),
        ),
    ),
)


def grafana() -> dict[str, Any]:
    """The dashboard in Grafana's format."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for index, panel in enumerate(PANELS):
        targets = [
            {
                "refId": chr(ord("A") + i),
                "expr": series.expression,
                "legendFormat": series.legend,
                "datasource": source,
            }
            for i, series in enumerate(panel.series)
        ]
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {"h": 7, "w": 8, "x": 8 * (index % 3), "y": 7 * (index // 3)},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": targets,
            }
        )
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    return {
        "uid": "jetflow",
        "title": "JetFlow Cluster",
        "tags": ["jetflow", "ray"],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }


def _sums(scrape: Scrape, name: str, by: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for (each, labels), value in scrape.items():
        if each == name:
            key = dict(labels).get(by, "") if by else ""
            found[key] = found.get(key, 0.0) + value
    return found


def _quantile(before: Mapping[str, float], now: Mapping[str, float], quantile: float) -> float | None:
    """As Prometheus: linear within the bucket that the rank falls in."""
    edges = sorted((float(edge), count - before.get(edge, 0.0)) for edge, count in now.items())
    if not edges or edges[-1][1] <= 0:
        return None
    rank, low, below = quantile * edges[-1][1], 0.0, 0.0
    for edge, count in edges:
        if count >= rank:
            return low if edge == float("inf") else low + (edge - low) * (rank - below) / max(count - below, 1e-12)
        low, below = edge, count
    return low


def write_grafana(path: Path) -> None:
    """Writes the dashboard's file."""
    path.write_text(json.dumps(grafana(), indent=1) + "\n", encoding="utf-8")


def metrics_of(panels: Sequence[Panel] = PANELS) -> set[Metric]:
    """All metrics that panels read."""
    series = [each for panel in panels for each in panel.series]
    return {each.metric for each in series} | {each.over for each in series if each.over is not None}


if __name__ == "__main__":
    write_grafana(Path("deploy/grafana/jetflow.json"))
