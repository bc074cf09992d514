"""`jetflow bench start`: from the command to the first router that serves, beside an application that computes nothing.

Every start is a command of its own, as a user gives it. Shapes and kinds take turns: the empty application, a first
start (nothing measured, nothing compiled yet), and a second one.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.processes import cpu_seconds
from jetflow_cluster.bench.report import load_pyplot, write_json

EMPTY, FIRST, SECOND = "empty application", "first start", "second start"
#: What is served, and its replicas and actors of a replica.
SHAPES: dict[str, tuple[dict[str, str], int, int]] = {
    "one replica of one shard": ({}, 1, 1),
    "two replicas of two shards and a draft worker": (
        {
            "num_replicas": "2",
            "tensor_parallel_size": "2",
            "draft_placement": "dedicated",
            "num_draft_workers": "1",
        },
        2,
        3,
    ),
}
_SETTINGS = {"dtype": "float32", "grpc_port": "0", "http_port": "none"}
_LIMIT_S, _END_LIMIT_S = 300.0, 60.0
_NUM_TRIES, _RAY_TOO_SLOW = 3, "current node timed out during startup"
_PHASE = re.compile(r"([a-z][a-z ]*?) (\d+\.\d)(?: s)?(?=[,;)]|$)", re.IGNORECASE)


class StartFailedError(RuntimeError):
    """A start did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class StartBenchConfig:
    """Everything that decides a measurement."""

    #: Where ``results.json`` and ``start.png`` go.
    output_dir: Path
    #: Starts of each kind and shape.
    num_rounds: int = 2
    #: Another checkout of this project, whose starts are measured as well; None is none.
    before: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One that was measured."""

    seconds: float
    #: Of all processes until then, by what they are.
    cpu_s: dict[str, float]
    #: Seconds by phase, as the command said them.
    phases: dict[str, float] = field(default_factory=dict)
    load_average: float


def run_start_bench(config: StartBenchConfig, console: Console) -> dict[str, Any]:
    """Measures, writes ``results.json`` and the picture, and returns the former's content.

    Raises:
        StartFailedError: a start failed or took longer than five minutes; with its last lines.
    """
    trees: dict[str, Path | None] = {"": None}
    if config.before is not None:
        trees["before: "] = config.before
    found: dict[tuple[str, str], list[_Start]] = {}
    for _ in range(config.num_rounds):
        for shape, (settings, num_replicas, num_actors) in SHAPES.items():
            with console.status(f"{shape}: {EMPTY}"):
                empty = ["-m", "jetflow_cluster.cluster.empty", str(num_replicas), str(num_actors)]
                found.setdefault((shape, EMPTY), []).append(_measure(empty, {}))
            for prefix, tree in trees.items():
                with tempfile.TemporaryDirectory(prefix="jetflow-start-") as cache:
                    for kind in (FIRST, SECOND):
                        with console.status(f"{shape}: {prefix}{kind}"):
                            pairs = [f"{key}={value}" for key, value in (_SETTINGS | settings).items()]
                            arguments = ["-m", "jetflow_cluster", "serve", *pairs]
                            start = _measure(arguments, {"JETFLOW_CACHE_DIR": cache}, tree)
                            found.setdefault((shape, prefix + kind), []).append(start)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "num_rounds": config.num_rounds,
        "settings": _SETTINGS,
        "rows": [_row(shape, kind, starts, found[shape, EMPTY]) for (shape, kind), starts in found.items()],
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(results, config.output_dir / "results.json")
    _draw(results["rows"], config.output_dir / "start.png")
    return results


def start_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("shape", "start"):
        table.add_column(title)
    for title in ("s", "over empty, s", "CPU s", "load"):
        table.add_column(title, justify="right")
    for row in rows:
        added = "" if row["start"] == EMPTY else f"{row['added_s']:.1f}"
        cells = (f"{row['seconds']:.1f}", added, f"{row['cpu_s']:.1f}", f"{row['load_average']:.1f}")
        table.add_row(row["shape"], row["start"], *cells)
    return table


def read_phases(lines: Sequence[str]) -> dict[str, float]:
    """Seconds by phase from what ``jetflow serve`` says of its start; of several replicas the last that it names."""
    found: dict[str, float] = {}
    for line in lines:
        _, started, rest = line.partition("started in ") if "started in " in line else line.partition("start: ")
        if started:
            rest = rest.partition(": ")[2] if started == "started in " else rest
            rest = rest.replace("of these a replica", "replica").replace(" (", ", ")
            found |= {name.strip(): float(seconds) for name, seconds in _PHASE.findall(rest)}
    return found


def _measure(arguments: Sequence[str], variables: Mapping[str, str], tree: Path | None = None) -> _Start:
    """One start. Where other work keeps Ray's own processes from starting in its 30 s, it is tried again."""
    for _ in range(_NUM_TRIES - 1):
        try:
            return _measure_once(arguments, variables, tree)
        except StartFailedError as error:
            if _RAY_TOO_SLOW not in str(error):
                raise
    return _measure_once(arguments, variables, tree)


def _measure_once(arguments: Sequence[str], variables: Mapping[str, str], tree: Path | None) -> _Start:
    environment = os.environ | variables | {"COLUMNS": "4000", "PYTHONUNBUFFERED": "1"}
    if tree is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(tree), str(tree / "kernels")))
    lines: list[str] = []
    serving, ended = threading.Event(), threading.Event()
    load, began = os.getloadavg()[0], time.monotonic()
    # -P: not this folder, but what the environment names, says whose code it is.
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        # Ray's processes look in the folder of the command first.
        cwd=tree,
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("serving"):
                serving.set()
        ended.set()
        serving.set()

    threading.Thread(target=read, daemon=True).start()
    serving.wait(_LIMIT_S)
    seconds = time.monotonic() - began
    cpu_s = cpu_seconds(process.pid)
    is_served = serving.is_set() and not ended.is_set()
    _end(process)
    if not is_served:
        raise StartFailedError(f"{' '.join(arguments)}: does not serve: {' | '.join(lines[-5:])}")
    return _Start(seconds=seconds, cpu_s=cpu_s, phases=read_phases(lines), load_average=load)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    # The empty application waits for the end of its input, ours for the signal.
    process.stdin.close()
    process.terminate()
    try:
        process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _row(shape: str, kind: str, starts: Sequence[_Start], empty: Sequence[_Start]) -> dict[str, Any]:
    middle = sorted(starts, key=lambda start: start.seconds)[len(starts) // 2]
    # Of starts and floors of the same round, so that both had the same machine.
    added = [ours.seconds - floor.seconds for ours, floor in zip(starts, empty, strict=True)]
    return {
        "shape": shape,
        "start": kind,
        "seconds": round(statistics.median(start.seconds for start in starts), 2),
        "added_s": round(statistics.median(added), 2),
        "all_seconds": [round(start.seconds, 2) for start in starts],
        "cpu_s": round(sum(middle.cpu_s.values()), 2),
        "cpu_s_by_process": {name: round(seconds, 2) for name, seconds in middle.cpu_s.items()},
        "phases": middle.phases,
        "load_average": round(max(start.load_average for start in starts), 2),
    }


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = load_pyplot()
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(6 * len(SHAPES), 0.5 * len(rows) + 1.2), squeeze=False)
    for panel, shape in zip(axes[0], SHAPES, strict=True):
        chosen = [row for row in rows if row["shape"] == shape]
        colours = ["#9aa5b1" if row["start"] == EMPTY else "#0b7a75" for row in chosen]
        bars = panel.barh([row["start"] for row in chosen], [row["seconds"] for row in chosen], color=colours)
        panel.bar_label(bars, fmt=" %.1f s", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_title(shape, loc="left", fontsize=10)
        panel.set_xlabel("seconds from the command to a router that serves")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
