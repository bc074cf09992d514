"""What nodes export is read as it is written, and drawn."""

from __future__ import annotations

from pathlib import Path

from jetflow_cluster import metrics as m
from jetflow_cluster.bench.panels import PANELS, RATE, Panel, Series
from jetflow_cluster.bench.report import load_pyplot
from jetflow_cluster.bench.scrapes import Recorder, _draw_panel, parse
from jetflow_cluster.metrics import COUNTER, HISTOGRAM

TEXT = """# HELP ray_jetflow_request_success_total d
# TYPE ray_jetflow_request_success_total counter
ray_jetflow_request_success_total{Component="core_worker",finished_reason="stop",router_id="a \\"b\\""} 4.0
ray_jetflow_num_requests_running{replica_id="r"} 2.0
ray_other_thing{replica_id="r"} 2.0
"""


def test_lines_are_parsed() -> None:
    found = parse(TEXT)
    assert found == {
        (
            m.REQUEST_SUCCESS.exported,
            frozenset({("Component", "core_worker"), ("finished_reason", "stop"), ("router_id", 'a \\"b\\"')}),
        ): 4.0,
        (m.RUNNING.exported, frozenset({("replica_id", "r")})): 2.0,
    }


def test_panels_without_values_are_named_and_others_drawn(tmp_path: Path) -> None:
    recorder = Recorder([])
    everything = [metric for metric in m.CATALOGUE if metric.kind != HISTOGRAM]
    for step in range(3):
        values = {
            (metric.exported, frozenset((label, "0") for label in metric.labels)): 1.0 + step * (metric.kind == COUNTER)
            for metric in everything
        }
        recorder.scrapes.append((20.0 * step, values))
    waiting = {m.ROUTER_WAITING.exported, m.ROUTER_WAITING_TOKENS.exported}
    for _, found in recorder.scrapes:
        found.update({key: 0.0 for key in found if key[0] in waiting})
    latencies = {"Time to first token", "Inter-token latency", "Request latency", "Time in queues"}
    # A panel of zeros says as little as one without lines.
    assert set(recorder.empty_panels()) == latencies | {"Waiting in routers"}
    assert {panel.title for panel in PANELS} > latencies
    recorder.draw(tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").stat().st_size > 10_000


def test_series_by_number_are_drawn_in_their_order() -> None:
    series = Series(legend="{{depth}}", kind=RATE, metric=m.STEPS, by="depth")
    panel = Panel(title="by depth", unit="percentunit", series=(series,))
    recorder = Recorder([])
    for step in range(3):
        found = {(m.STEPS.exported, frozenset({("depth", str(d))})): float(step * d) for d in (11, 2, 10, 1, 0, 9, 3)}
        recorder.scrapes.append((20.0 * step, found))
    figure, axis = load_pyplot().subplots()
    _draw_panel(axis, panel, recorder.lines(panel))
    heights = [line.get_ydata()[-1] for line in axis.get_lines()]
    load_pyplot().close(figure)
    assert heights == [d / 20 for d in (0, 1, 2, 3, 9, 10, 11)]
