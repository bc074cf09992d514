"""`jetflow demo`: its parts in order; those that serve share one Ray, and served and lost one deployment."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from jetflow_cluster.bench.demo import DemoConfig, run_demo
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.progress import StartProgress
from jetflow_cluster.cluster.ray_output import ray_output_in

#: In the order in which they run.
SPEED, SERVED, LOST, SCALED = PARTS = ("speed", "served", "lost", "scaled")


def run_parts(parts: Sequence[str], config: DemoConfig, console: Console) -> list[Path]:
    """Runs parts of the demonstration and returns the files that they wrote.

    Args:
        parts: of `PARTS`; they run in that order, each in a folder of its name.
        config: of the first part; its folder is that of all.
        console: where it is shown.

    Raises:
        OutputsDifferError, TokensLostError: a token changed.
        RequestsFailedError, UnplannedLossError: something failed that was not to fail.
        StartError: a process could not start.
    """
    folder, began = config.output_dir, time.monotonic()
    written: list[Path] = []
    if SPEED in parts:
        run_demo(dataclasses.replace(config, output_dir=folder / SPEED), console)
        written += [folder / SPEED / name for name in ("results.json", "demo.png", "trees.html")]
    if any(part != SPEED for part in parts):
        log = folder / "ray.log"
        console.print(f"what Ray and its processes print goes to {log}", style="dim", highlight=False)
        # Bound to where standard output goes now.
        shown = Console(file=console.file, highlight=False, soft_wrap=True)
        with ray_output_in(log):
            written += _run_on_ray(parts, folder, config.max_tokens, shown)
    console.print(f"{', '.join(p for p in PARTS if p in parts)}: {time.monotonic() - began:.0f} s", highlight=False)
    return [path for path in written if path.exists()]


def _run_on_ray(parts: Sequence[str], folder: Path, max_tokens: int, console: Console) -> list[Path]:
    from jetflow_cluster.bench.demo_scaled import ScaledDemoConfig, run_scaled_demo
    from jetflow_cluster.bench.demo_served import ServedDemoConfig, expected_streams, run_served_demo
    from jetflow_cluster.cluster import launch

    served = ServedDemoConfig(output_dir=folder / SERVED, max_tokens=max_tokens)
    scaled = ScaledDemoConfig(output_dir=folder / SCALED)
    kept = [part for part in (SERVED, LOST) if part in parts]
    written: list[Path] = []
    streams = expected_streams(served, console) if kept else []
    progress = StartProgress(console)
    with progress:
        progress.begin("Ray")
        launch.connect(None, served.cluster if kept else scaled.cluster)
    try:
        if kept:
            with _deployed(served.cluster, progress, console) as address:
                for part in kept:
                    config = dataclasses.replace(served, output_dir=folder / part)
                    run_served_demo(config, address, streams, console, kills=part == LOST)
                    written += [folder / part / name for name in ("results.json", "streams.png")]
        if SCALED in parts:
            with _deployed(scaled.cluster, StartProgress(console) if kept else progress, console) as address:
                run_scaled_demo(scaled, address, console)
                written += [folder / SCALED / name for name in ("results.json", "scaled.png", "dashboard.png")]
    finally:
        with console.status("leaving Ray"):
            launch.leave()
    return written


@contextmanager
def _deployed(config: ClusterConfig, progress: StartProgress, console: Console) -> Iterator[str]:
    from jetflow_cluster.cluster import launch

    has_served = False
    try:
        with progress.following_replicas("replicas and router"):
            address = launch.deploy(config)
        replicas = launch.overview()["replicas"]
        for name, replica in replicas.items():
            pids = ", ".join(f"{process} {pid}" for process, pid in replica["pids"].items())
            console.print(f"replica {name}: {pids}", style="dim")
        console.print(progress.summary(replicas), style="dim")
        has_served = True
        yield address
    finally:
        with console.status("taking the deployment down"):
            launch.take_down(has_served=has_served)
