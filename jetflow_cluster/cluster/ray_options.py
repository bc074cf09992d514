"""How Ray is started on one machine. Imports nothing of what is served."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import ray

from jetflow_cluster.rpc import GRPC_ENVIRONMENT
from jetflow_kernels.machine import machine

#: What Ray's processes must find in their environment, so that stopped ones are replaced like dead ones, and routers
#: spend little on a delta. A replica that fails its health checks gets no time to drain, and a process that does not
#: end is killed after half a second.
RAY_ENVIRONMENT = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_kill_worker_timeout_milliseconds": "500",
    "RAY_worker_niceness": "0",
    # Serve's controller looks at everything this often; its own choice of 0.1 takes 3 % of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    **GRPC_ENVIRONMENT,
    # Load is reported to the autoscaling policy this often, in seconds.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def start_ray(num_cpus: int, *, log_to_driver: bool, metrics_port: int | None = None) -> None:
    """Starts a cluster of this machine alone and joins it.

    Args:
        num_cpus: that it counts, at least; no fewer than there are.
        log_to_driver: whether its processes' logs are shown here.
        metrics_port: where it exports its metrics; None takes a free one.

    Raises:
        RuntimeError: Ray did not start; with its reason.
    """
    os.environ.update(RAY_ENVIRONMENT)
    _keep_token()
    try:
        ray.init(
            # Without it Ray joins whatever somebody started on this machine with `ray start`.
            address="local",
            num_cpus=max(machine().num_cores, num_cpus),
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=log_to_driver,
            _metrics_export_port=metrics_port,
        )
    except Exception as error:
        # Ray raises what has no class of its own, such as where its processes take longer than 30 s to answer.
        raise RuntimeError(f"Ray did not start: {' '.join(str(error).split())}") from None


def _keep_token() -> None:
    """Ray keeps a cluster's token in the home folder. Where that cannot be written, this process and its children have
    one in their environment, and other commands of Ray cannot join the cluster."""
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        is_kept = (folder / "auth_token").exists() or os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        is_kept = False
    if not is_kept:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
