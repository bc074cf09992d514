"""A call that ended as cancelled although its caller did not cancel is a lost connection; one that was is not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from jetflow_cluster.rpc.client import AsyncJetFlowClient, JetFlowClient
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.retry import RetryPolicy
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import FinishReason, RequestDelta, SamplingParams
from support.api_client import FAST, KINDS, PROMPT, assert_whole, stream, use
from support.api_server import ApiServer, api_server, fail_after, hang_after, toy_text, toy_tokens
from support.reset_server import reset_server

#: What a proxy may say that knows no more than the code.
GONE = StatusError(grpc.StatusCode.CANCELLED, "not by this caller")
#: So patient that whoever waits a pause out fails.
SLOW = RetryPolicy(initial_backoff_s=60.0, max_backoff_s=60.0, resume_timeout_s=200.0)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


@KINDS
@pytest.mark.parametrize("num_events", [0, 1, 2, 4])
def test_a_stream_that_nobody_cancelled_goes_on(server: ApiServer, kind: str, num_events: int) -> None:
    params = SamplingParams(max_tokens=9, seed=5)
    server.servicer.faults = [fail_after(num_events, GONE)]
    deltas, output, found = stream(kind, server.address, params)
    assert_whole(deltas, output, params, 5)
    assert found.num_calls == 2


@KINDS
@pytest.mark.parametrize("num_tokens", [None, 0, 3], ids=["nothing", "started", "tokens"])
def test_a_stream_that_is_reset_goes_on_elsewhere(server: ApiServer, kind: str, num_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=9, seed=5)
    started = pb.Started(request_id="first", model="toy", seed=5, prompt_tokens=len(PROMPT.encode()))
    told = [] if num_tokens is None else [pb.GenerateEvent(started=started)]
    for offset, token in enumerate(toy_tokens(PROMPT, 5, num_tokens or 0)):
        # Text is a token behind.
        text = toy_text(toy_tokens(PROMPT, 5, offset)[-1:])
        told.append(pb.GenerateEvent(delta=pb.Delta(seq_offset=offset, token_ids=[token], text=text)))
    with reset_server(told) as address:
        deltas, output, found = stream(kind, [address, server.address], params)
    assert_whole(deltas, output, params, 5)
    assert found.num_calls == 2
    # What is read of a stream that is reset is as much as came in time.
    prior = list(server.servicer.requests[0].sampling.prior_output_token_ids)
    assert prior == output.token_ids[: len(prior)] and len(prior) <= (num_tokens or 0)


@KINDS
@pytest.mark.parametrize("is_reset", [False, True], ids=["told", "reset"])
def test_a_call_that_nobody_cancelled_is_sent_again(server: ApiServer, kind: str, is_reset: bool) -> None:
    with reset_server([]) as address:
        server.servicer.refusals = [] if is_reset else [GONE]
        servers = [address, server.address] if is_reset else server.address
        assert use(kind, servers, lambda client: client.model_card()).model == "toy"


@KINDS
@pytest.mark.parametrize("num_events", [0, 3])
def test_a_request_that_was_aborted_does_not_go_on(server: ApiServer, kind: str, num_events: int) -> None:
    server.servicer.faults = [fail_after(num_events, StatusError.cancelled("the request was aborted"))]
    with pytest.raises(StatusError, match="the request was aborted") as caught:
        stream(kind, server.address, SamplingParams(max_tokens=9))
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert len(server.servicer.requests) == 1


@KINDS
def test_what_the_caller_cancelled_does_not_go_on(server: ApiServer, kind: str) -> None:
    """The caller's wish and the end of the connection cross each other at every moment."""

    def cancel(found: Any, delta: RequestDelta) -> None:
        found.cancel()

    for num_events in (2, 3):
        server.servicer.faults = [fail_after(num_events, GONE)]
        before = len(server.servicer.requests)
        deltas, output, found = stream(kind, server.address, SamplingParams(max_tokens=9), on_delta=cancel)
        assert output.finish_reason is FinishReason.ABORT
        assert output.token_ids == [token for delta in deltas for token in delta.token_ids]
        assert found.num_calls == 1 and len(server.servicer.requests) == before + 1


def test_cancelling_ends_a_pause(server: ApiServer) -> None:
    server.servicer.faults = [fail_after(2, GONE)]
    with JetFlowClient(server.address, retry=SLOW) as client, client.stream(PROMPT, SamplingParams(max_tokens=9)) as s:
        threading.Timer(0.3, s.cancel).start()
        began = time.monotonic()
        assert len([delta for delta in s if delta.token_ids]) == 1
        assert time.monotonic() - began < 20
        assert s.output.finish_reason is FinishReason.ABORT
    assert len(server.servicer.requests) == 1


@pytest.mark.parametrize("moment", ["reading", "pause"])
def test_cancelling_the_task_is_never_resumed(server: ApiServer, moment: str) -> None:
    server.servicer.faults = [hang_after(2) if moment == "reading" else fail_after(2, GONE)]

    async def test() -> None:
        async with AsyncJetFlowClient(server.address, retry=SLOW) as client:
            task = asyncio.create_task(client.generate(PROMPT, SamplingParams(max_tokens=9)))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), 20)
            assert task.cancelled()

    asyncio.run(test())
    assert len(server.servicer.requests) == 1


@KINDS
def test_a_closed_client_does_not_go_on(server: ApiServer, kind: str) -> None:
    server.servicer.faults = [hang_after(3)]
    seen: list[RequestDelta] = []

    def read_sync() -> None:
        client = JetFlowClient(server.address, retry=FAST)
        with client.stream(PROMPT, SamplingParams(max_tokens=9)) as deltas:
            threading.Timer(0.3, client.close).start()
            seen.extend(deltas)

    async def read_async() -> None:
        client = AsyncJetFlowClient(server.address, retry=FAST)
        async with client.stream(PROMPT, SamplingParams(max_tokens=9)) as deltas:
            closing = asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(client.close()))
            seen.append(await anext(deltas))
            await anext(deltas)
            await anext(deltas)
            closing.cancel()

    with pytest.raises(StatusError, match="the client is closed") as caught:
        read_sync() if kind == "sync" else asyncio.run(read_async())
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert seen and len(server.servicer.requests) == 1
