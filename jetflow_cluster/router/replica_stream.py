"""One stream to a replica, from its opening until it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.outbox import Outbox
from jetflow_cluster.rpc.options import CHANNEL_OPTIONS
from jetflow_cluster.rpc.secret import split_address
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc

# A connection that went silent is left behind, and not taken up by the next attempt.
_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
#: Looks per `silence_s`.
_WATCH_PARTS = 10


class ReplicaStream:
    """A connection of its own with the `Attach` stream on it.

    Args:
        address: ``host:port`` of the replica's data plane, with its secret before it if it has one.
        config: of the router.
        outbox: what is sent.
        on_card: told what the replica serves, once.
        on_frame: told each frame.
        on_break: called at once when the stream is at its end, before anything is cleared away.
    """

    def __init__(
        self,
        address: str,
        config: RouterConfig,
        outbox: Outbox,
        *,
        on_card: Callable[[pb.ModelCard], None],
        on_frame: Callable[[rpb.ReplicaFrame], None],
        on_break: Callable[[], None],
    ):
        self._address, self._config, self._outbox = address, config, outbox
        self._on_card, self._on_frame, self._on_break = on_card, on_frame, on_break
        self._silent_s = 0.0
        self._has_frames = False
        self._stub: Any = None
        self._secret: tuple[tuple[str, str], ...] = ()

    async def run(self) -> None:
        """Keeps the stream until it breaks, and raises the reason."""
        address, self._secret = split_address(self._address)
        channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = replica_pb2_grpc.JetFlowReplicaStub(channel)
        call = self._stub.Attach(metadata=self._secret)
        parts = (self._read(call), self._write(call), self._watch(), self._describe())
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            self._on_break()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            await channel.close()

    async def encode(self, request: pb.TokenizeRequest, timeout_s: float) -> pb.TokenizeResponse:
        """Token ids by the replica's tokenizer and chat template. Raises `grpc.RpcError`."""
        return await self._stub.Encode(request, timeout=timeout_s, metadata=self._secret)

    async def _read(self, call: Any) -> None:
        while (frame := await call.read()) is not grpc.aio.EOF:
            self._silent_s, self._has_frames = 0.0, True
            self._on_frame(frame)
        raise ConnectionError("the replica ended the stream")

    async def _write(self, call: Any) -> None:
        await call.write(self._outbox.first_frame())
        while True:
            await call.write(await self._outbox.next_frame(self._config.ping_s))

    async def _describe(self) -> None:
        limit_s = self._config.connect_timeout_s
        self._on_card(await self._stub.Describe(pb.GetModelCardRequest(), timeout=limit_s, metadata=self._secret))

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = self._config.silence_s / _WATCH_PARTS
        while True:
            before = loop.time()
            await asyncio.sleep(pause_s)
            # A loop that was held up has frames to read; that it did not run is no silence of the replica.
            self._silent_s += min(loop.time() - before, 1.5 * pause_s)
            limit_s = self._config.silence_s if self._has_frames else self._config.connect_timeout_s
            if self._silent_s > limit_s:
                raise TimeoutError(f"nothing came for {self._silent_s:.2f} s")
