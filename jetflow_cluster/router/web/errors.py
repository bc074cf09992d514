"""Errors over HTTP: the same statuses as over gRPC, in the shape that clients of the OpenAI API know."""

from __future__ import annotations

import math
from typing import Any

import grpc

from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError, status_of
from jetflow_cluster.types import InvalidRequestError

#: HTTP status, type and code of each gRPC status; see ``docs/api.md``.
_HTTP: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.CANCELLED: (499, "cancelled", None),
    grpc.StatusCode.INTERNAL: (500, "server_error", None),
    grpc.StatusCode.ABORTED: (502, "server_error", "stream_lost"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error", "unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
#: Where fields of the gRPC request are in the JSON body.
_PREFIXES = (("sampling.", ""), ("chat.messages", "messages"), ("token_ids.ids", "prompt"))
_NAMES = {"text": "prompt", "token_ids": "prompt", "chat": "messages", "input": "prompt"}


class HttpError(Exception):
    """A request that is refused before it is anything that gRPC would know.

    Attributes:
        status: of HTTP.
        body: the JSON answer.
        headers: to be sent with it.
    """

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind=kind, code=code)
        self.headers: dict[str, str] = {}


def error_body(message: str, *, kind: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def http_error(error: Exception) -> HttpError | None:
    """What a client is told of an exception; None for one that it must not learn of."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequestError):
        error = _in_names_of_json(error)
    status = status_of(error)
    if status is None:
        return None
    http, kind, code = _HTTP.get(status.code, (500, "server_error", None))
    told = HttpError(http, status.message, kind=kind, code=code)
    if isinstance(error, InvalidRequestError):
        told.body["error"]["param"] = error.field
    if status.retry_after_s is not None:
        told.headers["retry-after"] = str(max(1, math.ceil(status.retry_after_s)))
        told.headers["retry-after-ms"] = str(max(1, round(status.retry_after_s * 1e3)))
    if status.code is grpc.StatusCode.UNAUTHENTICATED:
        told.headers["www-authenticate"] = "Bearer"
    if status.last_offset is not None:
        told.body["error"]["last_offset"] = status.last_offset
    return told


def internal_error(reference: str) -> HttpError:
    """A fault of the server, of which only a reference is told."""
    error = http_error(StatusError.internal(reference))
    assert error is not None
    return error


def _in_names_of_json(error: InvalidRequestError) -> InvalidFieldsError:
    problems = error.problems if isinstance(error, InvalidFieldsError) else (error,)
    return InvalidFieldsError(InvalidRequestError(_json_name(p.field), p.value, p.limit) for p in problems)


def _json_name(field: str) -> str:
    for prefix, replacement in _PREFIXES:
        if field.startswith(prefix):
            return replacement + field.removeprefix(prefix)
    return _NAMES.get(field, field)
