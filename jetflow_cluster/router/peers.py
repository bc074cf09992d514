"""The other routers, asked to end requests that are theirs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from jetflow_cluster.router.request_ids import owner_of
from jetflow_cluster.rpc.options import CHANNEL_OPTIONS
from jetflow_cluster.rpc.secret import split_address
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc

_log = logging.getLogger(__name__)
#: In the metadata of a call from one router to another, which then asks nobody.
FORWARDED = "x-jetflow-forwarded"
_TIMEOUT_S = 2.0


class Peers:
    """Channels to other routers, opened on first use. Belongs to one event loop.

    Args:
        router_id: of this router, which is not asked.
    """

    def __init__(self, router_id: str):
        self._router_id = router_id
        self._addresses: dict[str, str] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """Makes these the routers, by name and ``host:port``; this one may be among them."""
        self._addresses = {name: address for name, address in addresses.items() if name != self._router_id}

    async def abort(self, request_ids: Iterable[str]) -> set[str]:
        """Has other routers end requests: the one that an id names, or all of them. Returns those that ran."""
        wanted: dict[str, list[str]] = {}
        for request_id in request_ids:
            owner = owner_of(request_id)
            for name in [owner] if owner in self._addresses else self._addresses:
                wanted.setdefault(str(name), []).append(request_id)
        answers = await asyncio.gather(*(self._abort_at(name, ids) for name, ids in wanted.items()))
        return {request_id for answer in answers for request_id in answer}

    async def close(self) -> None:
        """Closes the channels."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def _abort_at(self, name: str, request_ids: list[str]) -> list[str]:
        address, secret = split_address(self._addresses[name])
        stub: Any = inference_pb2_grpc.JetFlowInferenceStub(self._channel(address))
        message = pb.AbortRequestRequest(request_ids=request_ids)
        try:
            answer = await stub.AbortRequest(
                message, timeout=_TIMEOUT_S, metadata=((FORWARDED, self._router_id), *secret)
            )
        except grpc.RpcError as error:
            _log.warning("router %s does not answer: %s", name, error.code())
            return []
        return list(answer.aborted_ids)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address]
