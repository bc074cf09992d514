"""A router before real replicas of a tiny model, with connections that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import ReplicaServer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.metrics import Metrics
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from support.toy_cluster import PATIENT, until

OPTIONS: dict[str, Any] = {"dtype": "float64", "device": "cpu", "num_pages": 96, "page_size": 8, "max_num_requests": 16}


class Wire:
    """A connection that can be cut, between a router and a replica."""

    def __init__(self, port: int):
        self.address = ""
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Ends what is connected; new connections can be made."""
        for writer in list(self._writers):
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


@dataclass
class Stack:
    """Replicas, the wires to them, and a router."""

    frontends: list[EngineFrontend]
    replicas: list[ReplicaServer]
    wires: list[Wire]
    router: RouterServer
    client: AsyncJetFlowClient

    async def is_idle(self) -> None:
        """Waits until no replica runs anything, and checks that no page is held."""
        await until(lambda: all(not frontend.engine.has_work for frontend in self.frontends))
        for frontend in self.frontends:
            stats = frontend.engine.stats()
            assert (stats.num_used_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)


@asynccontextmanager
async def stack(
    frontends: list[EngineFrontend], target: Path, metrics: Metrics | None = None, **options: Any
) -> AsyncIterator[Stack]:
    replicas, wires = [], []
    config = RouterConfig(**{"host": "127.0.0.1", "port": 0, "tokenizer": str(target)} | PATIENT | options)
    router = RouterServer(config, metrics=metrics)
    await router.start()
    client = AsyncJetFlowClient(f"127.0.0.1:{router.port}", timeout_s=100)
    try:
        for index, frontend in enumerate(frontends):
            replica = ReplicaServer(
                ReplicaServerConfig(replica_id=f"replica-{index}", host="127.0.0.1", metrics_interval_s=0.05),
                frontend,
                metrics=metrics,
            )
            replicas.append(replica)
            wires.append(Wire(await replica.start()))
            await wires[-1].start()
        router.set_replicas({f"replica-{index}": wire.address for index, wire in enumerate(wires)})
        await until(lambda: sum(load.healthy for load in router.load().replicas) == len(frontends))
        yield Stack(frontends, replicas, wires, router, client)
    finally:
        await client.close()
        await router.stop()
        for wire in wires:
            await wire.stop()
        for replica in replicas:
            await replica.stop()
