"""The processes around a measured router: a replica that only speaks the protocol, and the router itself."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc

#: Tokens of a delta, about what a verify step accepts, and their text.
TOKENS_PER_DELTA, _TEXT = 4, "return value\n"
REPLICA_ID = "replica-0"
_MAX_MODEL_LEN = 1 << 20
_HEARTBEAT_S = 0.25


class SyntheticReplica(replica_pb2_grpc.JetFlowReplicaServicer):
    """Answers every request with deltas as fast as its router reads them: one frame per step for all requests."""

    async def Describe(self, request: pb.GetModelCardRequest, context: Any) -> pb.ModelCard:
        """A card without a model behind it."""
        return pb.ModelCard(model="synthetic", vocab_size=1 << 17, max_model_len=_MAX_MODEL_LEN)

    async def Attach(self, frames: AsyncIterator[rpb.RouterFrame], context: Any) -> None:
        """See the proto."""
        #: Tokens told and tokens wanted, by request.
        running: dict[str, list[int]] = {}
        news = asyncio.Event()
        reader = asyncio.create_task(self._read(frames, running, news))
        load = pb.ReplicaLoad(replica_id=REPLICA_ID, healthy=True)
        step = 0
        try:
            await context.write(rpb.ReplicaFrame(load=load))
            while True:
                if not running:
                    news.clear()
                    try:
                        async with asyncio.timeout(_HEARTBEAT_S):
                            await news.wait()
                    except TimeoutError:
                        await context.write(rpb.ReplicaFrame(load=load))
                    continue
                step += 1
                await context.write(rpb.ReplicaFrame(step=step, events=list(_step(running))))
        finally:
            reader.cancel()

    @staticmethod
    async def _read(frames: AsyncIterator[rpb.RouterFrame], running: dict[str, list[int]], news: asyncio.Event) -> None:
        async for frame in frames:
            for submit in frame.submits:
                running[submit.request_id] = [0, submit.sampling.max_tokens]
            for abort in frame.aborts:
                running.pop(abort.request_id, None)
            news.set()


def _step(running: dict[str, list[int]]) -> Iterator[rpb.ReplicaEvent]:
    for name, (told, wanted) in list(running.items()):
        if told >= wanted:
            del running[name]
            finished = pb.Finished(finish_reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(completion_tokens=told))
            yield rpb.ReplicaEvent(request_id=name, finished=finished)
            continue
        ids = range(told, min(told + TOKENS_PER_DELTA, wanted))
        running[name][0] = ids.stop
        delta = pb.Delta(seq_offset=told, token_ids=ids, text=_TEXT, num_accepted=len(ids) - 1)
        yield rpb.ReplicaEvent(request_id=name, delta=delta)


async def _serve_replica(connection: Connection) -> None:
    server = grpc.aio.server()
    replica_pb2_grpc.add_JetFlowReplicaServicer_to_server(SyntheticReplica(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await _obey(connection, f"127.0.0.1:{port}")
    await server.stop(None)


async def _serve_router(connection: Connection) -> None:
    server = RouterServer(RouterConfig(host="127.0.0.1", port=0, silence_s=30.0))
    port = await server.start()
    server.set_replicas({REPLICA_ID: connection.recv()})
    while not server.is_serving:
        await asyncio.sleep(0.01)
    await _obey(connection, f"127.0.0.1:{port}")
    await server.stop()


async def _obey(connection: Connection, address: str) -> None:
    """Tells the address, then the CPU seconds of this process whenever it is asked, until the other side closes."""
    connection.send(address)
    ended = asyncio.Event()

    def answer() -> None:
        try:
            connection.recv()
            connection.send(time.process_time())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(connection.fileno())
            ended.set()

    asyncio.get_running_loop().add_reader(connection.fileno(), answer)
    await ended.wait()


def _main(serve: Callable[[Connection], Coroutine[Any, Any, None]], connection: Connection) -> None:
    asyncio.run(serve(connection))


class RouterUnderLoad:
    """Addresses of a router and of the replica behind it, each in a process of its own."""

    def __init__(self, replica: Connection, router: Connection):
        self.replica_address: str = replica.recv()
        router.send(self.replica_address)
        self.router_address: str = router.recv()
        self._router = router

    def router_cpu_s(self) -> float:
        """CPU seconds that the router has used so far."""
        self._router.send(None)
        seconds: float = self._router.recv()
        return seconds


@contextmanager
def router_under_load() -> Iterator[RouterUnderLoad]:
    """Starts both processes, and ends them."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for serve in (_serve_replica, _serve_router):
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(serve, theirs), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        yield RouterUnderLoad(*connections)
    finally:
        # The router first: a replica that goes before it is a fault that it would tell.
        for connection, process in reversed(list(zip(connections, processes, strict=True))):
            connection.close()
            process.join(5)
            process.kill()
