"""What benchmarks of ops that never wait for the host share."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, float | int | str | None]


def host_us(call: Callable[[], object], repeats: int = 15) -> float:
    """Median microseconds of a call on the host, behind two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e6


def replay_us(call: Callable[[], object], repeats: int = 50) -> float | None:
    """Median microseconds of a CUDA graph that holds one call; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    # Compiles, which a capture may not.
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def run(op: str, description: str, measure: Callable[[], list[Row]]) -> None:
    """Command line of one benchmark: the op's test, its rows, and ``DIR/{op}.json``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "kernels")
    output: Path = parser.parse_args().output
    tests = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_interpreted.py", "-k", op]
    subprocess.run(tests, cwd=ROOT, check=True)
    rows = measure()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}
    output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine | {"torch": torch.__version__}, "rows": rows}
    (output / f"{op}.json").write_text(json.dumps(result, indent=1))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *("not run" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values())
        )
    Console().print(table)
    if gpu is None:
        Console().print("No GPU is here: the kernels were not timed.")
