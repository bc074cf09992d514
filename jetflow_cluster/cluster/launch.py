"""Deploys the application from one process: what ``jetflow serve`` does."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.failures import LostError, read_failure
from jetflow_cluster.cluster.placement import replica_shape
from jetflow_cluster.cluster.ray_options import start_ray
from jetflow_cluster.env import read_environment
from jetflow_cluster.router.ports import claim

_log = logging.getLogger(__name__)
APP_NAME = "jetflow"
_READY_TIMEOUT_S = 1800.0
_LOOK_S = 0.1
_MAX_TRACE_CALLS = 50
#: Seconds for a process that starts to answer.
_ANSWER_S = 2.0
#: Ports that processes of this cluster listen on; claimed until it is shut down.
_claims: list[socket.socket] = []


def connect(
    address: str | None, config: ClusterConfig, *, log_to_driver: bool = True, metrics_port: int | None = None
) -> None:
    """Joins the Ray cluster at `address`, or starts one on this machine.

    A cluster that is started here counts at least as many CPUs as the replicas' actors ask for, so that a small machine
    can try any shape; actors then share its cores.

    Args:
        address: of a cluster; None starts one.
        config: of what is to be deployed.
        log_to_driver: whether its processes' logs are shown here.
        metrics_port: where a cluster that is started exports its metrics, if that port is free; else it takes another.

    Raises:
        RuntimeError: Ray could not be started.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address is not None:
        ray.init(address=address, configure_logging=False, log_to_driver=log_to_driver)
        return
    bundles = replica_shape(config, cluster_has_gpus=False).bundles
    _compile_meanwhile()
    wanted = (config.max_replicas or config.num_replicas) * sum(bundle["CPU"] for bundle in bundles)
    claimed = claim(metrics_port) if metrics_port is not None else None
    if claimed is not None:
        _claims.append(claimed)
    start_ray(
        math.ceil(wanted),
        log_to_driver=log_to_driver,
        metrics_port=metrics_port if claimed is not None else None,
    )


def _compile_meanwhile() -> None:
    """On a machine that has compiled no kernels yet, has them compiled while Ray starts. Shards wait for what is being
    compiled, and compile what is missing."""
    environment = read_environment()
    folder = environment.cache_dir.expanduser() / "kernels"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # What cannot be kept is of use to no other process.
    if environment.cpu_kernels and os.access(folder, os.W_OK) and not any(folder.glob("*.so")):
        command = [sys.executable, "-c", "from jetflow_kernels.cpu import cpu_kernels; cpu_kernels()"]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def deploy(config: ClusterConfig) -> str:
    """Deploys and waits until a router is serving; returns its address ``host:port``.

    Raises:
        StartError: a part of it could not start; one sentence with actor, node, cause and log.
        RuntimeError: the deployment failed otherwise; with Serve's reason.
        TimeoutError: it did not become healthy.
    """
    # Routers have a port of their own, so Serve's HTTP proxy has nothing to do.
    serve.start(proxy_location="Disabled")
    target = serve.RunTarget(build_app(config), name=APP_NAME, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running()
    address = str(handle.address.remote().result())
    deadline = time.monotonic() + _READY_TIMEOUT_S
    # Asked within Ray: a client would need a certificate and a token where those are wanted.
    while not handle.is_serving.remote().result():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the router at {address} did not become healthy in {_READY_TIMEOUT_S:.0f} s")
        time.sleep(_LOOK_S)
    return address


def starting() -> dict[str, str]:
    """What the start of each replica is at, by its name; raises where nobody can say yet."""
    handle = serve.get_deployment_handle("Directory", APP_NAME)
    found: dict[str, str] = handle.starting.remote().result(timeout_s=_ANSWER_S)
    return found


def _wait_until_running() -> None:
    """Serve starts what failed again, which helps only where a process was lost: that may happen once."""
    lost: set[str] = set()
    while True:
        app = serve.status().applications[APP_NAME]
        for deployment in app.deployments.values():
            failure = read_failure(deployment.message)
            if failure is None or str(failure) in lost:
                continue
            if lost or not isinstance(failure, LostError):
                raise failure
            _log.warning("%s; it is started again", failure)
            lost.add(str(failure))
        if app.status == "RUNNING":
            return
        if app.status == "DEPLOY_FAILED":
            reasons = [d.message for d in app.deployments.values() if d.status == "DEPLOY_FAILED"]
            raise RuntimeError(f"the deployment failed: {' '.join((reasons or [app.message])[0].split())}")
        time.sleep(_LOOK_S)


def overview() -> dict[str, Any]:
    """All replicas and routers that run; see `Directory.overview`."""
    found: dict[str, Any] = serve.get_app_handle(_app_name()).overview.remote().result()
    return found


def metric_addresses() -> list[str]:
    """Where the living nodes export metrics, as ``host:port``."""
    return [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes() if n["Alive"]]


def _app_name() -> str:
    """Of the application that runs, whoever deployed it."""
    applications = serve.status().applications
    found = [name for name, app in applications.items() if "EngineReplica" in app.deployments]
    if not found:
        raise RuntimeError(f"nothing of this kind is served here; applications: {', '.join(applications) or 'none'}")
    return found[0]


def trace(seconds: float) -> dict[str, Any]:
    """What the processes of all replicas did in the last seconds, in the Chrome trace format.

    Raises:
        RuntimeError: a replica does not answer.
    """
    handle = serve.get_deployment_handle("EngineReplica", _app_name())
    wanted = set(overview()["replicas"])
    found: dict[str, list[dict[str, Any]]] = {}
    # Serve chooses who answers; calls at the same time spread.
    for _ in range(_MAX_TRACE_CALLS):
        calls = [handle.trace.remote(seconds) for _ in wanted]
        found |= dict(call.result() for call in calls)
        if wanted <= set(found):
            return {"traceEvents": [event for events in found.values() for event in events]}
    raise RuntimeError(f"no answer came from {', '.join(sorted(wanted - set(found)))}")


def take_down(*, has_served: bool = True) -> None:
    """Takes the application down; running requests are finished first where it has served."""
    serve.delete(APP_NAME, _blocking=has_served)


def shut_down(*, has_served: bool = True) -> None:
    """Takes the application down and leaves Ray."""
    take_down(has_served=has_served)
    leave()


def leave() -> None:
    """Leaves Ray, and ends what `connect` started."""
    ray.shutdown()
    while _claims:
        _claims.pop().close()
