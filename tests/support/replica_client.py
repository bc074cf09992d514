"""What a router says to a replica, and what it hears, over a real connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import ReplicaServer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.convert import sampling_to_proto
from jetflow_cluster.rpc.options import CHANNEL_OPTIONS
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc
from jetflow_cluster.types import SamplingParams

WAIT_S = 120.0


@dataclass(kw_only=True)
class Heard:
    """What a stream told of one request."""

    started: pb.Started | None = None
    deltas: list[pb.Delta] = field(default_factory=list)
    finished: pb.Finished | None = None
    refused: rpb.Refused | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def has_ended(self) -> bool:
        return self.finished is not None or self.refused is not None


class RouterStream:
    """One attached stream; reads all the time unless it is told not to."""

    def __init__(self, port: int, router_id: str = "router-a", *, grace_ms: int = 0, reads: bool = True):
        self.frames: list[rpb.ReplicaFrame] = []
        self.heard: dict[str, Heard] = {}
        #: Called with each request's id and delta before anything else is read.
        self.on_delta: Callable[[str, pb.Delta], None] = lambda request_id, delta: None
        #: What ended the reading.
        self.error: Exception | None = None
        self._hello = rpb.Hello(router_id=router_id, grace_ms=grace_ms)
        # A connection may take its time to be made: this is the least that gRPC allows one.
        options = dict(CHANNEL_OPTIONS) | {"grpc.min_reconnect_backoff_ms": 60_000, "grpc.use_local_subchannel_pool": 1}
        if not reads:
            # Windows that fill soon, and do not grow.
            options |= {"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 65_536}
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(options.items()))
        self.stub = replica_pb2_grpc.JetFlowReplicaStub(self._channel)
        self.call: Any = None
        self._reads, self._changed = reads, asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._unsent: asyncio.Queue[rpb.RouterFrame] = asyncio.Queue()

    async def __aenter__(self) -> RouterStream:
        self.call = self.stub.Attach()
        await self.call.write(rpb.RouterFrame(hello=self._hello))
        self._tasks = [asyncio.create_task(self._write())]
        if self._reads:
            self._tasks.append(asyncio.create_task(self._read()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Goes without a word, as a router that dies."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.call.cancel()
        await self._channel.close()

    def send(self, frame: rpb.RouterFrame) -> None:
        self._unsent.put_nowait(frame)

    def submit(
        self, request_id: str, token_ids: Sequence[int], params: SamplingParams, timeout_ms: int | None = None
    ) -> None:
        submit = rpb.Submit(
            request_id=request_id, token_ids=token_ids, sampling=sampling_to_proto(params), timeout_ms=timeout_ms
        )
        self.send(rpb.RouterFrame(submits=[submit]))

    def abort(self, *request_ids: str) -> None:
        self.send(rpb.RouterFrame(aborts=[rpb.Abort(request_id=request_id) for request_id in request_ids]))

    async def wait(self, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: holds() or self.error is not None)
        if not holds() and self.error is not None:
            raise self.error

    async def ended(self, *request_ids: str) -> list[Heard]:
        await self.wait(lambda: all(name in self.heard and self.heard[name].has_ended for name in request_ids))
        return [self.heard[name] for name in request_ids]

    async def begun(self, *request_ids: str) -> None:
        """Behind the first delta of each."""
        await self.wait(lambda: all(name in self.heard and self.heard[name].deltas for name in request_ids))

    async def closed(self) -> grpc.StatusCode:
        """The status that the replica ended the stream with."""
        async with asyncio.timeout(WAIT_S):
            return await self.call.code()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            while True:
                await self.call.write(await self._unsent.get())

    async def _read(self) -> None:
        try:
            async for frame in self.call:
                self.frames.append(frame)
                for event in frame.events:
                    self._take(event)
                async with self._changed:
                    self._changed.notify_all()
        except Exception as error:
            self.error = error
            async with self._changed:
                self._changed.notify_all()

    def _take(self, event: rpb.ReplicaEvent) -> None:
        heard = self.heard.setdefault(event.request_id, Heard())
        assert not heard.has_ended, "nothing comes behind the end"
        kind = event.WhichOneof("event")
        if kind == "delta":
            expected = heard.deltas[-1].seq_offset + len(heard.deltas[-1].token_ids) if heard.deltas else None
            assert expected in (None, event.delta.seq_offset)
            heard.deltas.append(event.delta)
            self.on_delta(event.request_id, event.delta)
        else:
            setattr(heard, str(kind), getattr(event, str(kind)))


@contextlib.asynccontextmanager
async def replica_server(frontend: EngineFrontend, **options: Any) -> AsyncIterator[ReplicaServer]:
    """A server on a free port that is stopped at the end."""
    server = ReplicaServer(ReplicaServerConfig(**({"host": "127.0.0.1"} | options)), frontend)
    await server.start()
    try:
        yield server
    finally:
        async with asyncio.timeout(WAIT_S):
            await server.stop()


async def until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Waits for something that nobody tells of."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.01)
