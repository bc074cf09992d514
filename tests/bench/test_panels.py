"""What the dashboard's figures are, from scraped values."""

from __future__ import annotations

import pytest

from jetflow_cluster import metrics as m
from jetflow_cluster.bench.panels import MEAN, QUANTILE, RATE, RATIO, VALUE, Series


def scrape(**values: dict[str, float]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name, values by ``label=value``."""
    return {
        (name, frozenset(tuple(pair.split("=")) for pair in labels.split(",") if pair)): value  # type: ignore[misc]
        for name, each in values.items()
        for labels, value in each.items()
    }


SUCCESS, DRAFTS = m.REQUEST_SUCCESS.exported, m.NUM_DRAFTS.exported
ACCEPTED, TTFT = m.NUM_ACCEPTED.exported, f"{m.TIME_TO_FIRST_TOKEN.exported}_bucket"
BEFORE = scrape(**{SUCCESS: {"finished_reason=stop,r=1": 4}, DRAFTS: {"r=1": 10}, ACCEPTED: {"r=1": 20}})
NOW = scrape(
    **{
        SUCCESS: {"finished_reason=stop,r=1": 8, "finished_reason=stop,r=2": 2, "finished_reason=length,r=1": 6},
        DRAFTS: {"r=1": 20, "r=2": 10},
        ACCEPTED: {"r=1": 40, "r=2": 30},
        m.KV_USAGE.exported: {"r=1": 0.2, "r=2": 0.6},
        TTFT: {"le=0.1": 10, "le=0.5": 30, "le=+Inf": 40},
    }
)


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (
            Series(legend="{{finished_reason}}", kind=RATE, metric=m.REQUEST_SUCCESS, by="finished_reason"),
            {"stop": 3.0, "length": 3.0},
        ),
        (Series(legend="tokens", kind=RATIO, metric=m.NUM_ACCEPTED, over=m.NUM_DRAFTS, offset=1.0), {"tokens": 3.5}),
        (Series(legend="used", kind=MEAN, metric=m.KV_USAGE), {"used": 0.4}),
        (Series(legend="used", kind=VALUE, metric=m.KV_USAGE), {"used": 0.8}),
        (Series(legend="p50", kind=QUANTILE, metric=m.TIME_TO_FIRST_TOKEN, quantile=0.5), {"p50": 0.3}),
        (Series(legend="p99", kind=QUANTILE, metric=m.TIME_TO_FIRST_TOKEN, quantile=0.99), {"p99": 0.5}),
        (Series(legend="steps", kind=RATE, metric=m.STEPS), {}),
        (Series(legend="p50", kind=QUANTILE, metric=m.E2E_LATENCY, quantile=0.5), {}),
    ],
    ids=lambda value: value.kind + value.legend if isinstance(value, Series) else "",
)
def test_values(series: Series, expected: dict[str, float]) -> None:
    assert series.values(BEFORE, NOW, 2.0) == pytest.approx(expected)
