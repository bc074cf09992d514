"""The HTTP server, in the event loop of the router."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jetflow_cluster.router.ports import is_free
from jetflow_cluster.router.tls import ServerCertificate

#: Connections that may wait to be taken.
_BACKLOG = 512
_KEEP_ALIVE_S = 30
#: Seconds that calls get to end when the server stops.
_STOP_GRACE_S = 1
#: Seconds for which a server that leaves keeps connections without a request, longer than clients keep theirs in wait,
#: and between two looks at them.
_IDLE_S, _LOOK_S = 6.0, 0.05


class _Server(uvicorn.Server):
    """Leaves the process's signals to whoever runs the event loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class HttpServer:
    """Serves an application on one port.

    Args:
        app: the application.
        host: interface to listen on.
        port: 0 takes a free one.
        certificate: for TLS; None serves without.
        stall_s: seconds that written bytes may wait for the client to take them; then its connection is ended.
        max_connections: open at once; further ones are answered with 503.
        share_port: let another server of this node listen there too.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        certificate: ServerCertificate | None = None,
        stall_s: float,
        max_connections: int,
        share_port: bool = False,
    ):
        self._address, self._stall_s, self._share_port = (host, port), stall_s, share_port
        #: True when answers are to tell clients to connect anew.
        self.is_leaving = False
        self._listener: socket.socket | None = None
        config = uvicorn.Config(
            self._told_to_leave(app),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_STOP_GRACE_S,
            limit_concurrency=max_connections,
        )
        self._certificate = certificate
        if certificate is not None:
            config.load()
            config.ssl = certificate.context
        self._server = _Server(config)
        self._refresher: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens, and returns the port.

        Raises:
            OSError: the port is taken.
        """
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._share_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Taken over by every connection: the kernel ends one whose other side takes nothing.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._stall_s * 1e3))
            listener.bind(self._address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._listener = listener
        self._task = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.001)
        if self._task.done():
            self._task.result()
        if self._certificate is not None:
            self._refresher = asyncio.create_task(self._refresh(self._certificate))
        return int(listener.getsockname()[1])

    async def hand_over(self, limit_s: float) -> None:
        """Leaves the port to the server that shares it, and returns when no connection is left, or behind `limit_s`.

        A request that comes on a connection made before is served, and its answer tells the client to connect anew.
        """
        host, port = self._listener.getsockname()[:2] if self._listener is not None else self._address
        self.is_leaving = True
        for each in self._server.servers:
            each.close()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + limit_s
        # Who has nobody to go to need not be waited for.
        idle_until = loop.time() + (0.0 if is_free(host, port) else _IDLE_S)
        while (connections := list(self._server.server_state.connections)) and loop.time() < ends_at:
            for connection in connections:
                # The request of an HTTP connection, as uvicorn's own `shutdown` looks at it.
                cycle = getattr(connection, "cycle", None)
                is_idle = cycle is None or cycle.response_complete
                if not is_idle or loop.time() >= idle_until:
                    # Of a request that runs, this has the connection end behind the answer.
                    connection.shutdown()
            await asyncio.sleep(_LOOK_S)

    async def stop(self) -> None:
        """Closes the port, gives calls a moment to end, and closes all connections. Safe to call twice."""
        if self._refresher is not None:
            self._refresher.cancel()
        task, self._task = self._task, None
        if task is not None:
            self._server.should_exit = True
            await task

    def _told_to_leave(self, app: ASGIApp) -> ASGIApp:
        """The application, whose answers end their connections while the server leaves."""

        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            async def sending(message: Message) -> None:
                if self.is_leaving and message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            await app(scope, receive, sending)

        return told

    @staticmethod
    async def _refresh(certificate: ServerCertificate) -> None:
        while True:
            await asyncio.sleep(1.0)
            certificate.refresh()
