"""What processes of one cluster prove to each other: a secret that comes with an address, as ``secret@host:port``."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

_KEY = "x-jetflow-secret"
_HEALTH = "/grpc.health.v1."


def with_secret(secret: str, address: str) -> str:
    """An address that lets in whoever knows it."""
    return f"{secret}@{address}" if secret else address


def split_address(address: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """``host:port`` of an address, and the metadata that each call there must have."""
    secret, _, place = address.rpartition("@")
    return place, ((_KEY, secret),) if secret else ()


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls without the secret with UNAUTHENTICATED; health tells everybody.

    Args:
        secret: at least 16 characters.
    """

    def __init__(self, secret: str):
        if len(secret) < 16:
            raise ValueError(f"secret of {len(secret)} characters: must be at least 16")
        self._secret = secret.encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(_refuse)
        self._stream_refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler | None:
        """Looks at the call's metadata."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        given = next((value for key, value in handler_call_details.invocation_metadata if key == _KEY), "")
        if hmac.compare_digest(given.encode(), self._secret):
            return handler
        return self._stream_refusal if handler.request_streaming or handler.response_streaming else self._refusal


async def _refuse(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port is for the cluster's own processes")
