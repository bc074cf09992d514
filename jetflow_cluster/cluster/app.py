"""The Serve application: a directory, engine replicas, and routers with their own gRPC port."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from jetflow_cluster.cluster.autoscaling import LoadPolicy, Targets
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.directory import REPORT_S, Directory, Members
from jetflow_cluster.cluster.failures import starting
from jetflow_cluster.cluster.handshake import die
from jetflow_cluster.cluster.observability import observe_process
from jetflow_cluster.cluster.ray_metrics import RayMetrics
from jetflow_cluster.cluster.replica_actors import ReplicaActors
from jetflow_cluster.models.hub import checkpoints
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.ports import why_not_free
from jetflow_cluster.router.safety import is_loopback
from jetflow_kernels.machine import Arithmetic

if TYPE_CHECKING:
    from jetflow_cluster.router.server import RouterServer

_log = logging.getLogger(__name__)
#: Seconds for a port to become free, or to be known as another router's of this cluster.
_PORT_TIMEOUT_S = 10.0
#: Seconds for the directory to answer a replica that starts.
_AGREE_TIMEOUT_S = 60.0


class EngineReplica:
    """One complete engine: it owns the actors, reports where they serve, and is off the path of requests.

    When a shard is gone it ends itself with all that is left, and Serve replaces it.
    """

    def __init__(self, config: ClusterConfig, directory: DeploymentHandle):
        self._directory = directory
        self._id = _own_id()
        # Equal configurations are one deployment's; another one's may compute otherwise.
        self._deployment = hashlib.sha256(repr(config).encode()).hexdigest()
        self._task: asyncio.Task[None] | None = None
        self._actors: ReplicaActors | None = None
        with starting(f"engine replica {self._id}"):
            observe_process(config, {"replica_id": self._id, "process": "engine replica"})
            actors = ReplicaActors(config, self._id, on_lost=self._end)
            try:
                self._served = actors.start(self._note_phase, self._agree)
            except BaseException:
                actors.close()
                raise
            self._actors = actors
        # Serve calls constructors on its event loop; to wait for its first look at the replica would cost a second.
        self._task = asyncio.get_running_loop().create_task(
            _report(self._directory, "replica", self._id, self._served.address, self._about)
        )

    def _note_phase(self, phase: str) -> None:
        """Nobody waits for the answer: a directory that is lost holds no start up."""
        self._directory.note_start.remote(self._id, phase)

    def _agree(self, own: Arithmetic) -> Arithmetic:
        """See `Directory.agree`. Asked in a thread: Serve's event loop is in the constructor."""
        with ThreadPoolExecutor(1) as thread:
            asked = self._directory.agree.remote
            answer = thread.submit(lambda: asked(self._id, self._deployment, own).result(timeout_s=_AGREE_TIMEOUT_S))
            agreed: Arithmetic = answer.result()
        return agreed

    async def check_health(self) -> None:
        """Answered on Serve's event loop: one that is stuck answers no more, as one that is stopped.

        Raises:
            RuntimeError: the replica reports to nobody any more.
        """
        if self._task is not None and self._task.done():
            raise RuntimeError(f"{self._id}: reports no more")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling policy is given; see `cluster.autoscaling`."""
        assert self._actors is not None
        return await asyncio.to_thread(self._actors.signals)

    async def trace(self, seconds: float) -> tuple[str, list[dict[str, Any]]]:
        """The replica's name, and what its actors did; see `ReplicaActors.trace`."""
        assert self._actors is not None
        return self._id, await asyncio.to_thread(self._actors.trace, seconds)

    def _about(self) -> dict[str, Any]:
        assert self._actors is not None
        pids = {"engine replica": os.getpid()} | self._actors.process_ids
        arithmetic = (self._deployment, self._served.arithmetic)
        return {"pids": pids, "phases": self._served.phases, "arithmetic": arithmetic}

    def _end(self, reason: str) -> None:
        assert self._actors is not None
        self._actors.close()
        die(f"{self._id}: {reason}")

    async def __del__(self) -> None:
        # Called after a constructor that failed, too.
        if self._actors is None:
            return
        if self._task is not None:
            self._task.cancel()
        await _leave(self._directory, "replica", self._id)
        await asyncio.to_thread(self._actors.drain)
        self._actors.close()


class Router:
    """A router with its own gRPC server, on the node's address and the configured port."""

    def __init__(self, config: ClusterConfig, directory: DeploymentHandle, engine: DeploymentHandle):
        # Nothing is asked of `engine`; Serve deploys what the ingress refers to.
        self._directory = directory
        self._id = _own_id()
        self._server: RouterServer | None = None
        self._starting = asyncio.Lock()
        self._reporter: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None
        with starting(f"router {self._id}"):
            observe_process(config, {"router_id": self._id, "process": "router"})
            self._config = _router_config(config, self._id)

    async def check_health(self) -> None:
        """Starts the server at the first call, on Serve's event loop."""
        if self._server is not None:
            return
        async with self._starting:
            if self._server is None:
                with starting(f"router {self._id}"):
                    await self._start()

    async def _start(self) -> None:
        from jetflow_cluster.router.server import RouterServer

        config = self._config
        ports = {"grpc_port": config.port, "http_port": config.http_port, "gateway_port": config.gateway_port}
        for name, port in ports.items():
            if port:
                await self._wait_for_port(name, port)
        server = RouterServer(self._config, metrics=RayMetrics({"router_id": self._id}))
        await server.start()
        address = server.peer_address
        self._server = server
        # What is there now stays: the collector need not look at it again and hold streams up.
        gc.collect()
        gc.freeze()
        self._reporter = asyncio.create_task(_report(self._directory, "router", self._id, address, self._about))
        self._follower = asyncio.create_task(self._follow())

    async def address(self) -> str:
        """Where it listens."""
        await self.check_health()
        assert self._server is not None
        return self._public_address

    async def is_serving(self) -> bool:
        """Whether requests can be served now."""
        await self.check_health()
        assert self._server is not None
        return self._server.is_serving

    async def overview(self) -> dict[str, Any]:
        """All replicas and routers: addresses, processes, seconds by phase of their start. See `Directory.overview`."""
        found: dict[str, Any] = await self._directory.overview.remote()
        return found

    @property
    def _public_address(self) -> str:
        host, port = self._config.host, self._server.port if self._server is not None else 0
        return f"{host if is_loopback(host) else get_node_ip_address()}:{port}"

    def _about(self) -> dict[str, Any]:
        # The address that is reported is that for other routers.
        return {"address": self._public_address, "pids": {"router": os.getpid()}}

    async def _wait_for_port(self, name: str, port: int) -> None:
        """Returns when the port is free, or a router of this cluster has it, whose place this one takes.

        Raises:
            RuntimeError: another program has it, or the host is not this node's.
        """
        deadline = time.monotonic() + _PORT_TIMEOUT_S
        ours = f"{get_node_ip_address()}:"
        while (reason := why_not_free(self._config.host, port)) is not None:
            try:
                members: Members = await self._directory.members.remote()
                if any(address.rpartition("@")[2].startswith(ours) for address in members.routers.values()):
                    return
            except Exception as error:
                _log.warning("the directory does not answer: %s", type(error).__name__)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} = {port}: {reason}")
            await asyncio.sleep(REPORT_S)

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
        # Called after a start that failed, too.
        if self._server is None:
            return
        if self._reporter is not None:
            self._reporter.cancel()
        await _leave(self._directory, "router", self._id)
        # Its streams may have to go on elsewhere meanwhile, so it still follows who is there.
        await self._server.hand_over()
        await self._server.stop()
        if self._follower is not None:
            self._follower.cancel()


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
        # Three checks in a row must fail. A process that died is noticed at the first.
        "health_check_period_s": 1.0,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": {"enable_access_log": False},
    }
    directory = serve.deployment(name="Directory", num_replicas=1, health_check_timeout_s=10.0, **common)(Directory)
    directory_app = directory.bind()
    scaling = autoscaling_config(config)
    engine = serve.deployment(
        name="EngineReplica",
        **({"num_replicas": config.num_replicas} if scaling is None else {"autoscaling_config": scaling}),
        max_surge_percent=config.max_surge_percent,
        health_check_timeout_s=config.health_timeout_s,
        graceful_shutdown_timeout_s=config.drain_timeout_s + 5.0,
        **common,
    )(EngineReplica).bind(config, directory_app)
    router = serve.deployment(
        name="Router",
        num_replicas=config.num_routers,
        health_check_timeout_s=config.health_timeout_s,
        # A second one only while the first is replaced; Serve spreads those that are there.
        max_replicas_per_node=2,
        max_surge_percent=config.max_surge_percent,
        graceful_shutdown_timeout_s=config.drain_timeout_s + 5.0,
        **common | {"ray_actor_options": {"num_cpus": config.num_cpus_per_router}},
    )(Router)
    return router.bind(config, directory_app, engine)


def autoscaling_config(config: ClusterConfig) -> dict[str, Any] | None:
    """Serve's configuration of a number of replicas that follows the load; None for one that stays."""
    if config.max_replicas is None or config.max_replicas == config.num_replicas:
        return None
    targets = {field.name: getattr(config, f"target_{field.name}") for field in fields(Targets)}
    policy = {"policy_function": f"{LoadPolicy.__module__}:{LoadPolicy.__name__}", "policy_kwargs": targets}
    return {
        "min_replicas": config.num_replicas,
        "initial_replicas": config.num_replicas,
        "max_replicas": config.max_replicas,
        "look_back_period_s": config.load_look_back_s,
        "metrics_interval_s": config.load_look_back_s / 5,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        "policy": policy,
    }


def _router_config(config: ClusterConfig, router_id: str) -> RouterConfig:
    target, _ = checkpoints(config.engine_config())
    return RouterConfig(
        router_id=router_id,
        host=_public_host(config),
        internal_host=get_node_ip_address(),
        port=config.grpc_port,
        safety=config.safety_config(),
        http_port=config.http_port,
        gateway_port=config.gateway_port,
        share_ports=True,
        tokenizer=str(target) if (target / "tokenizer.json").exists() else None,
        max_replica_tokens=config.max_replica_tokens,
        max_queued_tokens=config.max_queued_tokens,
        drain_timeout_s=config.drain_timeout_s,
    )


def _public_host(config: ClusterConfig) -> str:
    """Where a router of this node listens; nodes on one machine may each have a loopback address of their own."""
    if config.host is not None:
        return config.host
    own = get_node_ip_address()
    return own if is_loopback(own) else "127.0.0.1"


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


async def _report(
    directory: DeploymentHandle, kind: str, name: str, address: str, about: Callable[[], dict[str, Any]]
) -> None:
    while True:
        try:
            await directory.report.remote(kind, name, address, about())
        except Exception as error:
            _log.warning("the directory does not answer: %s", type(error).__name__)
        await asyncio.sleep(REPORT_S)
