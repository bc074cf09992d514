"""Errors of the API: as exceptions, as gRPC statuses with google.rpc details, and back.

What a client is told is one of these: a documented code, a text written for it, and typed details. An exception that
is none of them becomes INTERNAL with a reference under which the server's log has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from jetflow_cluster.types import InvalidRequestError

#: Domain of every `ErrorInfo`.
DOMAIN = "jetflow.inference.v1"
#: `ErrorInfo.reason` of CANCELLED by a server's own word.
REQUEST_ABORTED = "REQUEST_ABORTED"
#: `ErrorInfo.reason` of ABORTED, and the key of its metadata that holds the last offset.
STREAM_LOST = "STREAM_LOST"
LAST_OFFSET = "last_offset"

# A status travels in trailing metadata, which peers limit to 8 KiB by default.
_MAX_PROBLEMS = 32
_MAX_VALUE_CHARS = 48
_MAX_MESSAGE_CHARS = 512
_GIVEN = "; given "
_DETAIL_TYPES: tuple[type[Message], ...] = (
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ErrorInfo,
)


class InvalidFieldsError(InvalidRequestError):
    """A request with fields that cannot be honoured; all of them are named.

    `field`, `value` and `limit` are those of the first.

    Attributes:
        problems: one `InvalidRequestError` per field; `field` is its path in the message, as ``sampling.temperature``.
    """

    def __init__(self, problems: Iterable[InvalidRequestError]):
        self.problems = tuple(problems)
        if not self.problems:
            raise ValueError("problems = (): there must be at least one")
        first = self.problems[0]
        super().__init__(first.field, first.value, first.limit)
        self.args = (describe_problems(self.problems),)


class _Shown(str):
    """A value that is already as it should be shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def shorten(value: object) -> str:
    """A value in ASCII, cut to what an error can carry."""
    if isinstance(value, _Shown):
        return str(value)
    if isinstance(value, (str, bytes, list, tuple)):
        value = value[:_MAX_VALUE_CHARS]
    text = ascii(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def describe_problems(problems: Sequence[InvalidRequestError]) -> str:
    """One line that names the fields, values and limits, as far as there is room."""
    text = ""
    for index, problem in enumerate(problems):
        more = f"{'; ' if text else ''}{problem.field} = {shorten(problem.value)}: {problem.limit}"
        if len(text) + len(more) > _MAX_MESSAGE_CHARS:
            return f"{text}; and {len(problems) - index} more" if text else more[:_MAX_MESSAGE_CHARS]
        text += more
    return text


class StatusError(RuntimeError):
    """A call that ended with a gRPC status other than OK.

    Attributes:
        code: the `grpc.StatusCode`.
        message: one line for the caller.
        details: google.rpc detail messages.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()):
        super().__init__(f"{code.name}: {message}")
        self.code, self.message, self.details = code, message, tuple(details)

    @classmethod
    def invalid_argument(cls, problems: Sequence[InvalidRequestError]) -> StatusError:
        """Fields that cannot be honoured, each a violation of a `BadRequest`."""
        detail = error_details_pb2.BadRequest(
            field_violations=[
                {"field": problem.field, "description": f"{problem.limit}{_GIVEN}{shorten(problem.value)}"}
                for problem in problems[:_MAX_PROBLEMS]
            ]
        )
        return cls(grpc.StatusCode.INVALID_ARGUMENT, describe_problems(problems), [detail])

    @classmethod
    def unauthenticated(cls, message: str) -> StatusError:
        """The caller did not show who it is."""
        return cls(grpc.StatusCode.UNAUTHENTICATED, message)

    @classmethod
    def not_found(cls, message: str) -> StatusError:
        """A model or another named thing that is not served."""
        return cls(grpc.StatusCode.NOT_FOUND, message)

    @classmethod
    def resource_exhausted(cls, message: str, retry_after_s: float) -> StatusError:
        """No room now; the same request may be sent again after `retry_after_s` seconds."""
        return cls(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [_retry_info(retry_after_s)])

    @classmethod
    def unavailable(cls, message: str, retry_after_s: float | None = None) -> StatusError:
        """Nothing that could serve; the same request may be sent again, here or elsewhere."""
        return cls(grpc.StatusCode.UNAVAILABLE, message, [] if retry_after_s is None else [_retry_info(retry_after_s)])

    @classmethod
    def aborted(cls, message: str, last_offset: int) -> StatusError:
        """A stream that could not be carried on.

        Args:
            message: one line for the caller.
            last_offset: output tokens that were delivered, prior ones included; a request with them as prior output
                goes on where this one ended.
        """
        info = error_details_pb2.ErrorInfo(reason=STREAM_LOST, domain=DOMAIN, metadata={LAST_OFFSET: str(last_offset)})
        return cls(grpc.StatusCode.ABORTED, message, [info])

    @classmethod
    def deadline_exceeded(cls, message: str) -> StatusError:
        """The deadline passed, or cannot be met."""
        return cls(grpc.StatusCode.DEADLINE_EXCEEDED, message)

    @classmethod
    def cancelled(cls, message: str) -> StatusError:
        """The caller, or someone on its behalf, ended the request."""
        info = error_details_pb2.ErrorInfo(reason=REQUEST_ABORTED, domain=DOMAIN)
        return cls(grpc.StatusCode.CANCELLED, message, [info])

    @classmethod
    def data_loss(cls, message: str) -> StatusError:
        """What came is not what must have come; raised by clients only."""
        return cls(grpc.StatusCode.DATA_LOSS, message)

    @classmethod
    def internal(cls, reference: str = "") -> StatusError:
        """A fault of the server. Nothing about it is told but the reference under which the log has it."""
        message = f"internal error; the server's log has it as {reference}" if reference else "internal error"
        return cls(grpc.StatusCode.INTERNAL, message)

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the server wants the request again, where it said so."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToNanoseconds()) / 1e9
        return None

    @property
    def last_offset(self) -> int | None:
        """Output tokens that were delivered before the stream was lost, where the server said so."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.ErrorInfo) and LAST_OFFSET in detail.metadata:
                return int(detail.metadata[LAST_OFFSET])
        return None

    @property
    def is_lost_connection(self) -> bool:
        """CANCELLED without a server's word for it: to a caller that did not cancel, its connection was lost.

        So ends, for one, a call that crosses the end of a connection whose router leaves.
        """
        is_told = any(isinstance(d, error_details_pb2.ErrorInfo) and d.reason == REQUEST_ABORTED for d in self.details)
        return self.code is grpc.StatusCode.CANCELLED and not is_told

    def to_proto(self) -> status_pb2.Status:
        """The status with its details, as it travels."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        return status


def _retry_info(retry_after_s: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(max(0, round(retry_after_s * 1e3)))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def status_of(error: BaseException) -> StatusError | None:
    """The status that tells a client of an exception; None for one that it must not learn of."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, InvalidFieldsError):
        return StatusError.invalid_argument(error.problems)
    if isinstance(error, InvalidRequestError):
        return StatusError.invalid_argument([error])
    return None


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: StatusError) -> NoReturn:
    """Ends a call with the error's code, message and details; trailing metadata set before is kept."""
    status = rpc_status.to_status(error.to_proto())
    earlier = tuple(context.trailing_metadata() or ())
    await context.abort(status.code, status.details, (*earlier, *status.trailing_metadata))
    raise AssertionError("abort() returned")


def error_from_rpc(error: Any) -> StatusError | InvalidFieldsError:
    """What a failed call says, from a `grpc.RpcError` that is a call or a `grpc.aio.AioRpcError`."""
    code = error.code() or grpc.StatusCode.UNKNOWN
    details = _details_of(error)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        problems = [
            _problem_from(violation)
            for detail in details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        ]
        if problems:
            return InvalidFieldsError(problems)
    return StatusError(code, error.details() or code_pb2.Code.Name(code.value[0]), details)


def _problem_from(violation: error_details_pb2.BadRequest.FieldViolation) -> InvalidRequestError:
    limit, _, value = violation.description.partition(_GIVEN)
    return InvalidRequestError(violation.field, _Shown(value), limit)


def _details_of(error: Any) -> list[Message]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # A proxy on the way changed the code or the message; the details are then not about them.
        return []
    return [] if status is None else [unpacked for packed in status.details if (unpacked := _unpack(packed))]


def _unpack(packed: any_pb2.Any) -> Message | None:
    for kind in _DETAIL_TYPES:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
