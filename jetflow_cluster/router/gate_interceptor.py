"""The gate before every call over gRPC."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from jetflow_cluster.router.gate import Gate

#: Probes of health have no token.
_HEALTH = "/grpc.health.v1."


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls in or not, before their message is looked at; stands behind `ErrorInterceptor`.

    Args:
        gate: decides.
    """

    def __init__(self, gate: Gate):
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler | None:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        metadata = handler_call_details.invocation_metadata or ()
        authorization = next((value for key, value in metadata if key == "authorization"), None)
        arity = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        return getattr(grpc, f"{arity}_rpc_method_handler")(
            self._guard(getattr(handler, arity), authorization),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guard(self, behaviour: Callable[..., Any], authorization: str | None) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def generating(request: Any, context: Any) -> AsyncIterator[Any]:
                self._gate.identify(authorization)
                async for response in behaviour(request, context):
                    yield response

            return generating

        async def guarded(request: Any, context: Any) -> Any:
            with self._gate.enter(authorization):
                return await behaviour(request, context)

        return guarded
