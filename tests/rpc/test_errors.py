"""What a client is told of an error, and what it is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jetflow_cluster.rpc.errors import (
    DOMAIN,
    LAST_OFFSET,
    REQUEST_ABORTED,
    STREAM_LOST,
    InvalidFieldsError,
    StatusError,
    abort_with,
    describe_problems,
    error_from_rpc,
    shorten,
    status_of,
)
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.types import InvalidRequestError
from support.api_server import ApiServer, api_server, refuse

PROBLEMS = [
    InvalidRequestError("sampling.temperature", -1.0, "must be a number in [0, 100]"),
    InvalidRequestError("text", "x" * 10_000, "must be at most 9 bytes"),
]


@pytest.mark.parametrize(
    "error, code, details",
    [
        pytest.param(StatusError.not_found("a"), "NOT_FOUND", [], id="not-found"),
        pytest.param(
            StatusError.resource_exhausted("a", 1.25),
            "RESOURCE_EXHAUSTED",
            [error_details_pb2.RetryInfo(retry_delay={"seconds": 1, "nanos": 250_000_000})],
            id="exhausted",
        ),
        pytest.param(StatusError.unavailable("a"), "UNAVAILABLE", [], id="unavailable"),
        pytest.param(
            StatusError.unavailable("a", -1.0),
            "UNAVAILABLE",
            [error_details_pb2.RetryInfo(retry_delay={})],
            id="unavailable-with-hint",
        ),
        pytest.param(
            StatusError.aborted("a", 17),
            "ABORTED",
            [error_details_pb2.ErrorInfo(reason=STREAM_LOST, domain=DOMAIN, metadata={LAST_OFFSET: "17"})],
            id="aborted",
        ),
        pytest.param(StatusError.deadline_exceeded("a"), "DEADLINE_EXCEEDED", [], id="deadline"),
        pytest.param(
            StatusError.cancelled("a"),
            "CANCELLED",
            [error_details_pb2.ErrorInfo(reason=REQUEST_ABORTED, domain=DOMAIN)],
            id="cancelled",
        ),
        pytest.param(StatusError.internal("ab12"), "INTERNAL", [], id="internal"),
        pytest.param(
            StatusError.invalid_argument(PROBLEMS),
            "INVALID_ARGUMENT",
            [
                error_details_pb2.BadRequest(
                    field_violations=[
                        {"field": "sampling.temperature", "description": "must be a number in [0, 100]; given -1.0"},
                        {"field": "text", "description": f"must be at most 9 bytes; given {shorten('x' * 99)}"},
                    ]
                )
            ],
            id="invalid",
        ),
    ],
)
def test_errors_have_a_code_and_typed_details(error: StatusError, code: str, details: list[Any]) -> None:
    assert error.code is grpc.StatusCode[code]
    assert list(error.details) == details
    status = error.to_proto()
    assert (status.code, status.message) == (error.code.value[0], error.message)
    for packed, detail in zip(status.details, details, strict=True):
        assert packed.Is(detail.DESCRIPTOR)


@pytest.mark.parametrize(
    "value, shown",
    [
        pytest.param(1.5, "1.5", id="number"),
        pytest.param("é\n", r"'\xe9\n'", id="ascii"),
        pytest.param("x" * 100, f"'{'x' * 44}...", id="long-text"),
        pytest.param([1] * 10**6, f"[{'1, ' * 14}1,...", id="long-list"),
        pytest.param(10**100, f"1{'0' * 44}...", id="long-number"),
    ],
)
def test_values_are_shown_short_and_in_ascii(value: object, shown: str) -> None:
    assert shorten(value) == shown
    assert len(shown) <= 48


def test_many_problems_keep_to_the_space_that_there_is() -> None:
    many = [InvalidRequestError(f"field_{i}", "x" * 1000, "must be less than that") for i in range(40)]
    message = describe_problems(many)
    assert len(message) < 600
    assert "and " in message
    assert message.endswith(" more")
    assert len(StatusError.invalid_argument(many).to_proto().SerializeToString()) < 6000


def test_invalid_fields_name_all_and_behave_like_the_first() -> None:
    error = InvalidFieldsError(PROBLEMS)
    assert (error.field, error.value) == ("sampling.temperature", -1.0)
    assert error.problems == tuple(PROBLEMS)
    assert "sampling.temperature = -1.0" in str(error)
    assert "text = 'xxx" in str(error)
    assert len(str(error)) < 300
    with pytest.raises(ValueError, match="at least one"):
        InvalidFieldsError([])


@pytest.mark.parametrize(
    "error, code",
    [
        pytest.param(InvalidFieldsError(PROBLEMS), "INVALID_ARGUMENT", id="fields"),
        pytest.param(PROBLEMS[0], "INVALID_ARGUMENT", id="field"),
        pytest.param(StatusError.not_found("x"), "NOT_FOUND", id="status"),
        pytest.param(ValueError("x"), None, id="value"),
        pytest.param(KeyError("x"), None, id="key"),
    ],
)
def test_only_errors_for_clients_have_a_status(error: Exception, code: str | None) -> None:
    status = status_of(error)
    assert (status and status.code.name) == code


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


def failure_of(server: ApiServer, method: str) -> grpc.RpcError:
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.JetFlowInferenceStub(channel)
        asked: dict[str, Any] = {
            "GetModelCard": lambda: stub.GetModelCard(pb.GetModelCardRequest(), timeout=60),
            "GenerateStream": lambda: list(stub.GenerateStream(pb.GenerateRequest(text="x"), timeout=60)),
        }
        with pytest.raises(grpc.RpcError) as caught:
            asked[method]()
    return caught.value


METHODS = pytest.mark.parametrize("method", ["GetModelCard", "GenerateStream"])


def let_fail(server: ApiServer, error: Exception, times: int = 1) -> None:
    server.servicer.refusals = [error] * times
    server.servicer.faults = [refuse(error)] * times


@METHODS
def test_other_exceptions_are_told_as_internal_and_logged_once(
    server: ApiServer, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    let_fail(server, RuntimeError("the password is hunter2"), times=3)
    with caplog.at_level(logging.ERROR, logger="jetflow_cluster"):
        failures = [failure_of(server, method) for _ in range(3)]
    for failure in failures:
        assert failure.code() is grpc.StatusCode.INTERNAL
        assert failure.details().startswith("internal error; the server's log has it as ")
        assert rpc_status.from_call(failure).details == []
    records = [record for record in caplog.records if "jetflow_cluster" in record.name]
    assert [bool(record.exc_info) for record in records] == [True, False, False]
    for record, failure in zip(records, failures, strict=True):
        assert failure.details().rsplit(" ", 1)[-1] in record.getMessage()
        assert "hunter2" not in failure.details()


@METHODS
@pytest.mark.parametrize(
    "error", [InvalidFieldsError(PROBLEMS), StatusError.aborted("lost", 3)], ids=["invalid", "aborted"]
)
def test_statuses_travel_with_their_details(server: ApiServer, method: str, error: Exception) -> None:
    let_fail(server, error)
    failure = failure_of(server, method)
    status = status_of(error)
    assert status is not None
    assert rpc_status.from_call(failure) == status.to_proto()
    found = error_from_rpc(failure)
    if isinstance(error, InvalidFieldsError):
        assert isinstance(found, InvalidFieldsError)
        assert str(found) == str(error)
    else:
        assert isinstance(found, StatusError)
        assert found.last_offset == 3


def test_abort_with_keeps_trailing_metadata() -> None:
    class Servicer(inference_pb2_grpc.JetFlowInferenceServicer):
        async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvent]:
            context.set_trailing_metadata((("x-jetflow-replica", "replica-3"),))
            await abort_with(context, StatusError.resource_exhausted("full", 0.5))
            yield pb.GenerateEvent()

    async def run() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_JetFlowInferenceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = inference_pb2_grpc.JetFlowInferenceStub(channel).GenerateStream(pb.GenerateRequest(), timeout=60)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        await server.stop(None)
        assert dict(caught.value.trailing_metadata())["x-jetflow-replica"] == "replica-3"
        found = error_from_rpc(caught.value)
        assert isinstance(found, StatusError)
        assert (found.code, found.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.5)

    asyncio.run(run())
