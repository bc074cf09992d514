"""``jetflow serve``."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from jetflow_cluster.console import stderr, stdout
from jetflow_cluster.types import InvalidRequestError

#: Where metrics are exported, if the port is free.
METRICS_PORT = 8080
SERVE_EXAMPLES = (
    "Examples:\n\n  jetflow serve\n\n"
    "  jetflow serve tensor_parallel_size=2 draft_placement=dedicated num_draft_workers=1\n\n"
    "  jetflow serve model=folder/of/target draft_head=folder/of/head --address auto\n\n"
    'Then:\n\n  jetflow generate "def fibonacci(n):" --server localhost:9000'
)


def serve(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Fields of the configuration, key=value.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A Serve configuration file; its first application is served.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to deploy on, auto for this machine's; without it, start one here.")
    ] = None,
) -> None:
    """Serve a model over gRPC until Ctrl-C."""
    from jetflow_cluster.cluster.config import ClusterConfig
    from jetflow_cluster.cluster.preflight import check_before_start
    from jetflow_cluster.cluster.progress import StartProgress
    from jetflow_cluster.cluster.ray_lines import RayLines

    wanted = ClusterConfig.from_mapping((_read_file(config) if config is not None else {}) | _pairs(settings or []))
    has_served = False
    printed = RayLines(sys.stdout), RayLines(sys.stderr)
    sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], printed)
    with StartProgress(stderr) as progress:
        progress.begin("looking at the configuration")
        check_before_start(wanted, is_here=address is None)
        progress.begin("Ray")
        from jetflow_cluster.cluster import launch

        launch.connect(address, wanted, metrics_port=METRICS_PORT)
    try:
        with progress.following_replicas("replicas and router"):
            served = launch.deploy(wanted)
        replicas = launch.overview()["replicas"]
        for name, replica in replicas.items():
            pids = ", ".join(f"{process} {pid}" for process, pid in replica["pids"].items())
            stderr.print(f"replica {name}: {pids}", highlight=False)
        stderr.print(progress.summary(replicas), highlight=False)
        stderr.print(
            f"metrics: {', '.join(f'http://{node}/metrics' for node in launch.metric_addresses())}", highlight=False
        )
        # Only now: until it serves, Ctrl-C ends the start.
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        has_served = True
        for stream in printed:
            stream.is_starting = False
        stdout.print(f"serving at {served}", highlight=False)
        stopped.wait()
    finally:
        if has_served:
            stderr.print("draining")
        launch.shut_down(has_served=has_served)


def timeline(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path("timeline.json"),
    seconds: Annotated[float, typer.Option(min=0.001, help="How far to look back.")] = 10.0,
    address: Annotated[str, typer.Option(help="Ray cluster that serves; auto is this machine's.")] = "auto",
) -> None:
    """Write what every process of the served replicas did in the last seconds, for Perfetto or chrome://tracing."""
    import json

    from jetflow_cluster.cluster import launch
    from jetflow_cluster.cluster.config import ClusterConfig

    launch.connect(address, ClusterConfig(), log_to_driver=False)
    found = launch.trace(seconds)
    output.write_text(json.dumps(found), encoding="utf-8")
    stdout.print(f"wrote {len(found['traceEvents'])} events to {output}")


def _pairs(settings: list[str]) -> dict[str, Any]:
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidRequestError("settings", setting, "must be key=value")
        found[key] = value
    return found


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"config = {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"config = {str(path)!r}: is no YAML") from None
    applications = found.get("applications") if isinstance(found, dict) else None
    if not applications:
        raise ValueError(f"{path}: applications is missing or empty")
    if applications[0].get("deployments"):
        raise ValueError(f"{path}: applications[0].deployments is for `serve deploy`; give what is wanted within args")
    return dict(applications[0].get("args") or {})
