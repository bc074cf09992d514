"""A replica's gRPC server."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.meter import ReplicaMeter
from jetflow_cluster.cluster.replica.servicer import ReplicaServicer
from jetflow_cluster.cluster.replica.step_loop import StepLoop
from jetflow_cluster.cluster.replica.ticket import LoopState
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.metrics import Metrics, NoMetrics
from jetflow_cluster.rpc.interceptor import ErrorInterceptor
from jetflow_cluster.rpc.options import SERVER_OPTIONS
from jetflow_cluster.rpc.secret import SecretInterceptor
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc

#: Name under which `grpc.health.v1` tells whether requests are taken; the empty name tells that the process lives.
HEALTH_SERVICE = "jetflow.inference.v1.JetFlowReplica"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class ReplicaServer:
    """Serves one engine to routers, from `start` to `stop`, in one event loop.

    Args:
        config: of the replica.
        frontend: of a warmed-up engine, which nobody else may use from `start` to `stop`.
        metrics: are told a few times a second.
    """

    def __init__(self, config: ReplicaServerConfig, frontend: EngineFrontend, *, metrics: Metrics | None = None):
        self._config, self._frontend = config, frontend
        self._meter = ReplicaMeter(metrics or NoMetrics())
        self._teller: asyncio.Task[None] | None = None
        self._servicer: ReplicaServicer | None = None
        self._server: Any = None
        self._health = health.aio.HealthServicer()
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where the server listens; 0 before it does."""
        return self._port

    @property
    def step_loop(self) -> StepLoop:
        """The loop of the engine, for its state, its failure and traces.

        Raises:
            RuntimeError: the server does not run.
        """
        return self._running.step_loop

    def load(self) -> pb.ReplicaLoad:
        """The load as routers are told it, at this moment.

        Raises:
            RuntimeError: the server does not run.
        """
        return self._running.load()

    async def start(self) -> int:
        """Listens and serves.

        Returns:
            The port.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        servicer = ReplicaServicer(self._config, self._frontend, on_state=self._note_state)
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if self._config.secret:
            interceptors.append(SecretInterceptor(self._config.secret))
        self._server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        replica_pb2_grpc.add_JetFlowReplicaServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._port = self._server.add_insecure_port(_address(self._config.host, self._config.port))
        servicer.start()
        self._servicer = servicer
        await self._health.set(HEALTH_SERVICE, _SERVING)
        await self._server.start()
        self._teller = asyncio.create_task(self._tell())
        return self._port

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests and waits for the running ones; routers take what is left elsewhere.

        Args:
            timeout_s: None is `drain_timeout_s` of the configuration.

        Returns:
            Whether all ended by themselves.
        """
        return await self._running.drain(self._config.drain_timeout_s if timeout_s is None else timeout_s)

    async def stop(self) -> None:
        """Ends all that runs and all that was started. Safe to call again, and before `start`."""
        servicer, self._servicer = self._servicer, None
        if servicer is None:
            return
        if self._teller is not None:
            self._teller.cancel()
        await self._health.enter_graceful_shutdown()
        await servicer.stop()
        await self._server.stop(self._config.stop_timeout_s)
        await asyncio.gather(*self._tasks)

    async def _tell(self) -> None:
        while self._servicer is not None:
            loop = self._servicer.step_loop
            is_speculating = self._servicer.load().speculating
            self._meter.tell(loop.load(), loop.counts, is_speculating=is_speculating, step_age_s=loop.step_age_s)
            await asyncio.sleep(self._config.metrics_interval_s)

    @property
    def _running(self) -> ReplicaServicer:
        if self._servicer is None:
            raise RuntimeError("the server does not run")
        return self._servicer

    def _note_state(self, state: LoopState) -> None:
        # Every state but the first ends the taking of requests for good.
        status = _SERVING if state is LoopState.RUNNING else _NOT_SERVING
        task = asyncio.get_running_loop().create_task(self._health.set(HEALTH_SERVICE, status))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
