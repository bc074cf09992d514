"""What Ray's nodes export, read as Prometheus would, and the dashboard's figures drawn from it."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetflow_cluster.bench.panels import PANELS, Panel, Scrape
from jetflow_cluster.bench.report import load_pyplot

_LINE = re.compile(r"^(ray_jetflow_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TIMEOUT_S = 5.0
#: Seconds over which a rate is taken; values change every ten at Ray's default.
_WINDOW_S = 12.0
#: What the dashboard's units say in words.
_UNITS = {"s": "seconds", "reqps": "per second", "ops": "per second"}
#: More series than this are shades of one colour.
_MAX_COLOURS = 6


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """This project's values in Prometheus' text format."""
    return {(name, frozenset(_LABEL.findall(labels))): float(value) for name, labels, value in _LINE.findall(text)}


@dataclass
class Recorder:
    """Scrapes some addresses ``host:port`` now and then."""

    addresses: Sequence[str]
    #: Moments by `time.monotonic`, and what was found.
    scrapes: list[tuple[float, Scrape]] = field(default_factory=list)

    def scrape(self) -> None:
        """Once; a node that does not answer is left out."""
        found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for address in self.addresses:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
                    found |= parse(answer.read().decode())
            except OSError:
                continue
        self.scrapes.append((time.monotonic(), found))

    def lines(self, panel: Panel) -> dict[str, list[tuple[float, float]]]:
        """Seconds since the first scrape and values, by the panel's legends."""
        found: dict[str, list[tuple[float, float]]] = {}
        start = self.scrapes[0][0] if self.scrapes else 0.0
        for index, (moment, now) in enumerate(self.scrapes):
            earlier = [pair for pair in self.scrapes[:index] if moment - pair[0] >= _WINDOW_S]
            if not earlier:
                continue
            since, before = earlier[-1]
            for series in panel.series:
                for legend, value in series.values(before, now, moment - since).items():
                    found.setdefault(legend, []).append((moment - start, value))
        return found

    def empty_panels(self) -> list[str]:
        """Titles of panels that have nothing to show but zeros."""
        lines = {panel.title: self.lines(panel).values() for panel in PANELS}
        return [title for title, found in lines.items() if not any(value for line in found for _, value in line)]

    def draw(self, path: Path) -> None:
        """All panels, as the dashboard arranges them."""
        plt = load_pyplot()
        num_rows = -(-len(PANELS) // 3)
        figure, axes = plt.subplots(num_rows, 3, figsize=(15, 2.6 * num_rows), squeeze=False)
        for axis, panel in zip(axes.flat, PANELS, strict=False):
            _draw_panel(axis, panel, self.lines(panel))
        for axis in axes[-1]:
            axis.set_xlabel("seconds", fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_panel(axis: Any, panel: Panel, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Series by their names, in the order of numbers where these are; the legend is above them and hides none."""
    names = sorted(lines, key=int) if all(name.isdigit() for name in lines) else list(lines)
    are_many = len(names) > _MAX_COLOURS
    for index, name in enumerate(names):
        style: dict[str, Any] = {"color": _shade(index / len(names))} if are_many else {}
        # Of a row of shades some are named.
        label = name if not are_many or index % -(-len(names) // _MAX_COLOURS) == 0 else "_"
        axis.plot(*zip(*lines[name], strict=True), linewidth=1.2, label=label, **style)
    unit = _UNITS.get(panel.unit, "")
    num_columns = _MAX_COLOURS if are_many else 3
    num_rows = 1 if are_many else -(-len(names) // num_columns)
    axis.set_title(f"{panel.title}{unit and f', {unit}'}", loc="left", fontsize=9, pad=4 + 11 * num_rows)
    axis.set_ylim(bottom=0, top=None if any(value for line in lines.values() for _, value in line) else 1)
    axis.tick_params(labelsize=7)
    if panel.unit == "percentunit":
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    legend = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "borderaxespad": 0, "frameon": False}
    if names:
        axis.legend(fontsize=7, ncols=num_columns, handlelength=1, columnspacing=1.2, **legend)


def _shade(share: float) -> tuple[float, float, float]:
    """From the first of a row, dark, to the last, light."""
    return 0.04 + 0.7 * share, 0.36 + 0.45 * share, 0.46 + 0.4 * share
