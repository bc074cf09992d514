"""The last line of a server: no exception reaches a client but as a status that was written for it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from jetflow_cluster.rpc.errors import StatusError, abort_with, status_of
from jetflow_cluster.types import InvalidRequestError

_log = logging.getLogger(__name__)
#: Different faults whose traceback is logged; further ones, and each one's repetitions, get a line.
_MAX_TRACEBACKS = 256
#: Answers probes by itself.
_HEALTH = "/grpc.health.v1."
#: Seconds that a status may wait for a client that takes nothing; then its call is cut off.
_STATUS_S = 2.0


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions of this API's methods into statuses.

    `StatusError`, `InvalidFieldsError` and `InvalidRequestError` are told as they are. Any other exception becomes
    INTERNAL with a reference; the log has the reference and, the first time that a fault occurs, its traceback.
    Cancellation and `context.abort` pass. Methods of the health service are left alone.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[type, str, int]] = set()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler | None:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_HEALTH):
            return handler
        wrap = self._guard_stream if handler.response_streaming else self._guard_unary
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        deserialize = handler.request_deserializer
        is_raw = handler.request_streaming or deserialize is None
        return make(
            wrap(getattr(handler, kind), method),
            request_deserializer=deserialize if is_raw else _Reader(deserialize),
            response_serializer=handler.response_serializer,
        )

    def _guard_unary(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def guarded(request: Any, context: Any) -> Any:
            try:
                return await behaviour(_readable(request), context)
            except Exception as error:
                await self._end(context, error, method)

        return guarded

    def _guard_stream(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        if not inspect.isasyncgenfunction(behaviour):
            return self._guard_unary(behaviour, method)

        async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async with contextlib.aclosing(behaviour(_readable(request), context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await self._end(context, error, method)

        return guarded

    async def _end(self, context: Any, error: Exception, method: str) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, NotImplementedError):
            error = StatusError(grpc.StatusCode.UNIMPLEMENTED, "this method is not served")
        try:
            async with asyncio.timeout(_STATUS_S):
                await abort_with(context, status_of(error) or self._internal(error, method))
        except TimeoutError:
            raise asyncio.CancelledError from None
        raise AssertionError("abort() returned")

    def _internal(self, error: Exception, method: str) -> StatusError:
        reference = secrets.token_hex(4)
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = (type(error), where.filename, where.lineno or 0)
        is_new = fault not in self._seen and len(self._seen) < _MAX_TRACEBACKS
        if is_new:
            self._seen.add(fault)
        _log.error(
            "%s failed (%s): %s at %s:%s",
            method,
            reference,
            type(error).__name__,
            where.filename,
            where.lineno,
            exc_info=error if is_new else None,
        )
        return StatusError.internal(reference)


class _Unreadable:
    """Bytes that are no message."""


class _Reader:
    """Reads a message. What fails within gRPC's own reading would end as INTERNAL, with a stack in the log."""

    def __init__(self, deserialize: Callable[[bytes], Any]):
        self._deserialize = deserialize

    def __call__(self, data: bytes) -> Any:
        try:
            return self._deserialize(data)
        except DecodeError:
            return _Unreadable()


def _readable(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise InvalidRequestError("request", "its bytes", "must be a message of this method, with text in UTF-8")
    return request


def _arity(is_stream: bool) -> str:
    return "stream" if is_stream else "unary"
