"""The Serve application: a directory, engine replicas, and routers with their own gRPC port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.directory import REPORT_S, Directory, Members
from jetflow_cluster.cluster.replica_actors import ReplicaActors
from jetflow_cluster.engine.loading import checkpoints
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.server import RouterServer

_log = logging.getLogger(__name__)


class EngineReplica:
    """One complete engine: it owns the actors, reports where they serve, and is off the path of requests."""

    def __init__(self, config: ClusterConfig, directory: DeploymentHandle):
        self._directory = directory
        self._id = _own_id()
        self._actors = ReplicaActors(config, self._id)
        self._served = self._actors.start()
        self._task: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Raises when a shard is gone; Serve then replaces the replica."""
        if self._task is None:
            self._task = asyncio.create_task(_report(self._directory, "replica", self._id, self._served.address))
        if self._actors.lost is not None:
            await _leave(self._directory, "replica", self._id)
            raise RuntimeError(self._actors.lost)

    async def describe(self) -> dict[str, Any]:
        """Where it serves, the processes of its actors, and how long each phase of its start took."""
        pids = await asyncio.to_thread(self._actors.process_ids)
        return {"replica_id": self._id, "address": self._served.address, "pids": pids, "phases": self._served.phases}

    async def __del__(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await _leave(self._directory, "replica", self._id)
        await asyncio.to_thread(self._actors.drain)
        self._actors.close()


class Router:
    """A router with its own gRPC server, on the node's address and the configured port."""

    def __init__(self, config: ClusterConfig, directory: DeploymentHandle, engine: DeploymentHandle):
        # Serve deploys what the ingress refers to.
        self._directory, self._engine = directory, engine
        self._id = _own_id()
        target, _ = checkpoints(config.engine_config())
        tokenizer = str(target) if (Path(target) / "tokenizer.json").exists() else None
        self._config = RouterConfig(
            router_id=self._id, port=config.grpc_port, tokenizer=tokenizer, drain_timeout_s=config.drain_timeout_s
        )
        self._server: RouterServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def check_health(self) -> None:
        """Starts the server at the first call, on Serve's event loop."""
        if self._server is not None:
            return
        self._server = RouterServer(self._config)
        port = await self._server.start()
        address = f"{get_node_ip_address()}:{port}"
        self._tasks = [
            asyncio.create_task(_report(self._directory, "router", self._id, address)),
            asyncio.create_task(self._follow()),
        ]

    async def address(self) -> str:
        """Where it listens."""
        await self.check_health()
        assert self._server is not None
        return f"{get_node_ip_address()}:{self._server.port}"

    async def describe_replica(self) -> dict[str, Any]:
        """What one of the engine replicas says of itself."""
        found: dict[str, Any] = await self._engine.describe.remote()
        return found

    async def _follow(self) -> None:
        known = 0
        while True:
            try:
                members: Members = await self._directory.members.remote(known)
            except Exception as error:
                _log.warning("the directory does not answer: %s", type(error).__name__)
                await asyncio.sleep(REPORT_S)
                continue
            assert self._server is not None
            if members.version != known:
                known = members.version
                self._server.set_replicas(members.replicas)
                self._server.set_peers(members.routers)

    async def __del__(self) -> None:
        await _leave(self._directory, "router", self._id)
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.drain()
            await self._server.stop()


def build_app(args: Mapping[str, Any] | ClusterConfig | None = None) -> Application:
    """The application that ``serve run jetflow_cluster.cluster.app:build_app key=value ...`` deploys.

    Args:
        args: fields of `ClusterConfig`.

    Raises:
        ValueError: unknown fields, with the nearest known ones, or values that do not fit.
    """
    config = args if isinstance(args, ClusterConfig) else ClusterConfig.from_mapping(args or {})
    common = {
        "max_ongoing_requests": 10_000,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": {"enable_access_log": False},
    }
    directory = serve.deployment(name="Directory", num_replicas=1, **common)(Directory).bind()
    engine = serve.deployment(
        name="EngineReplica",
        num_replicas=config.num_replicas,
        graceful_shutdown_timeout_s=config.drain_timeout_s + 5.0,
        **common,
    )(EngineReplica).bind(config, directory)
    router = serve.deployment(
        name="Router",
        num_replicas=config.num_routers,
        max_replicas_per_node=1,
        graceful_shutdown_timeout_s=config.drain_timeout_s + 5.0,
        **common,
    )(Router)
    return router.bind(config, directory, engine)


def _own_id() -> str:
    context = serve.get_replica_context()
    return str(context.replica_id.unique_id)


async def _leave(directory: DeploymentHandle, kind: str, name: str) -> None:
    """The directory may be gone before those whom it lists, and then nothing answers."""
    try:
        async with asyncio.timeout(REPORT_S):
            await directory.leave.remote(kind, name)
    except Exception as error:
        _log.info("the directory does not answer: %s", type(error).__name__)


async def _report(directory: DeploymentHandle, kind: str, name: str, address: str) -> None:
    while True:
        try:
            await directory.report.remote(kind, name, address)
        except Exception as error:
            _log.warning("the directory does not answer: %s", type(error).__name__)
        await asyncio.sleep(REPORT_S)
