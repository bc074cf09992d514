"""What the benchmarks of this folder share. Each is named after its op and is run as a script."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, float | int | str | None]
#: Some 10 ms of a GPU.
_SLEEP_CYCLES = 20_000_000


def median_us(call: Callable[[], object], device: str, repeats: int = 30) -> float:
    """Median microseconds of a call, behind a few that do not count. On a GPU, of the device's own time; between calls
    its cache is overwritten, as the other layers do."""
    for _ in range(3):
        call()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in events:
        cache.zero_()
        # The host gets ahead meanwhile, so that launching is not what is timed.
        torch.cuda._sleep(_SLEEP_CYCLES)
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start_event.elapsed_time(end_event) for start_event, end_event in events) * 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty((2**30 if device == "cuda" else 2**26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_us(lambda: target.copy_(source), device, 10) * 1e-6)


def print_table(rows: list[Row]) -> None:
    """Plain columns."""
    names = list(rows[0])
    lines = [names, *([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def run(op: str, rows_on: Callable[[str, float], Iterable[Row]], about: str) -> None:
    """The command line of one benchmark: the op's test first, then `rows_on` for a device and its copy bandwidth."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "kernels")
    output: Path = parser.parse_args().output
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tests = f"tests/kernels/interpreted/{op}_cases.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    bandwidth = copy_bandwidth(device)
    rows = list(rows_on(device, bandwidth))
    machine: dict[str, object] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "copy_bandwidth_gb_per_s": bandwidth / 1e9,
        "torch": torch.__version__,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{op}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(machine)
    print_table(rows)
