"""`grpc.health.v1` of a server whose services are all well or none."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check and Watch. Belongs to one event loop.

    Args:
        services: names that are known; the empty one is the whole server.
    """

    def __init__(self, services: Collection[str]):
        self._services = frozenset(services)
        self._is_serving = self._is_closed = False
        #: Set, and replaced, when anything changes.
        self._changed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """What is told."""
        return self._is_serving and not self._is_closed

    def set_serving(self, is_serving: bool) -> None:
        """Changes what is told."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake()

    def close(self) -> None:
        """Tells for good that nothing is served; ends the watches."""
        self._is_closed = True
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The status of a service; NOT_FOUND for one that is not known."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The status of a service, now and whenever it changes."""
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if self._is_closed:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        kinds = health_pb2.HealthCheckResponse
        if service not in self._services:
            return int(kinds.SERVICE_UNKNOWN)
        return int(kinds.SERVING if self.is_serving else kinds.NOT_SERVING)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
