"""Bodies in and answers out, for as long as the client is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from jetflow_cluster.router.web.errors import HttpError
from jetflow_cluster.types import InvalidRequestError

#: Seconds for a body to come.
_BODY_TIMEOUT_S = 30.0
#: Digits of an integer in a body; more could be no value of any field.
_MAX_DIGITS = 20
_DONE = b"data: [DONE]\n\n"

#: Sends one JSON object of a stream of events.
Push = Callable[[dict[str, Any]], Awaitable[None]]


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body, which must be a JSON object.

    Raises:
        HttpError: 413 beyond `max_bytes`, 408 when it does not come, 415 for another type.
        InvalidRequestError: it is no JSON object.
    """
    # Asked for even where it could be guessed: another site's page can make a browser send a body without a type, and
    # no request with this one unless it was let.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "the body must be application/json")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise HttpError(408, f"the body did not come within {_BODY_TIMEOUT_S:.0f} s") from None
    try:
        body = json.loads(data, parse_constant=_no_number, parse_int=_integer)
        if b"\\u" in data:
            # An escape may be half a character, which no message can hold.
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        limit = "must be JSON in UTF-8, without lone surrogates"
        raise InvalidRequestError("body", f"{len(data)} bytes", limit) from None
    if not isinstance(body, dict):
        raise InvalidRequestError("body", type(body).__name__, "must be a JSON object")
    return body


def _too_large(max_bytes: int) -> HttpError:
    error = HttpError(413, f"the body must be at most {max_bytes} bytes", code="request_too_large")
    # What is left of it would be read as the next request.
    error.headers["connection"] = "close"
    return error


def _no_number(text: str) -> float:
    raise ValueError(text)


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(text)
    return int(text)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away. The body must have been read.

    Raises:
        ClientDisconnect: the client went away.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events, whose status waits for the first of them: an error before it is a status.

    Args:
        produce: pushes all objects; what it raises before the first is raised to the caller, later it is told as the
            last event.
        tell: what is told of an exception.
        has_done: whether ``[DONE]`` ends the stream.
    """

    def __init__(
        self,
        produce: Callable[[Push], Coroutine[Any, Any, None]],
        tell: Callable[[Exception], dict[str, Any]],
        *,
        has_done: bool = True,
    ):
        self._produce, self._tell, self._has_done = produce, tell, has_done
        self._send: Send
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        self._send = send
        with contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._run())

    async def _run(self) -> None:
        try:
            await self._produce(self._push)
        except Exception as error:
            if not self._has_begun:
                raise
            await self._push(self._tell(error))
            await self._write(b"", more=False)
            return
        await self._begin()
        await self._write(_DONE if self._has_done else b"", more=False)

    async def _push(self, item: dict[str, Any]) -> None:
        await self._begin()
        text = json.dumps(item, ensure_ascii=False, separators=(",", ":"))
        await self._write(f"data: {text}\n\n".encode(errors="replace"))

    async def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            headers.append((b"x-accel-buffering", b"no"))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
