"""Both clients against a real server: prompts, retries, errors, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from jetflow_cluster.rpc.client import AsyncJetFlowClient, JetFlowClient
from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.rpc.limits import MAX_TOKEN_IDS
from jetflow_cluster.types import FinishReason, InvalidRequestError, RequestOutput, SamplingParams
from support.api_client import KINDS, PROMPT, TIMEOUT_S, assert_whole, stream, use
from support.api_server import ApiServer, api_server, hang_after, refuse, toy_tokens


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


@KINDS
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_stream_gives_all_tokens(server: ApiServer, kind: str, max_tokens: int, seed: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=seed)
    deltas, output, found = stream(kind, server.address, params)
    assert_whole(deltas, output, params, 1234 if seed is None else seed)
    assert output.prompt_token_ids == list(PROMPT.encode())
    assert output.usage.prompt_tokens == len(PROMPT)
    assert output.usage.cached_tokens == 2
    assert output.seed == (seed or 1234)
    assert (output.logprobs, output.prompt_logprobs) == (None, None)
    assert (found.num_calls, found.finished.timing.total_s, found.started.replica_id) == (1, 1.5, "replica-0")


@KINDS
@pytest.mark.parametrize(
    "prompt, prompt_ids",
    [
        pytest.param("text", list(b"text"), id="text"),
        pytest.param([5, 17, 9], [5, 17, 9], id="token-ids"),
        pytest.param([{"role": "user", "content": "hi"}], list(b"hi"), id="chat"),
    ],
)
def test_generate_takes_every_kind_of_prompt(server: ApiServer, kind: str, prompt: Any, prompt_ids: list[int]) -> None:
    params = SamplingParams(max_tokens=5, logprobs=0, prompt_logprobs=0)
    output = use(kind, server.address, lambda client: client.generate(prompt, params, request_id="mine"))
    assert output.request_id == "mine"
    assert output.prompt_token_ids == prompt_ids
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, *prompt_ids[1:]]


@KINDS
@pytest.mark.parametrize(
    "error",
    [StatusError.resource_exhausted("full", 0.001), StatusError.unavailable("away"), StatusError.unavailable("x", 0.0)],
    ids=["exhausted", "unavailable", "unavailable-with-hint"],
)
@pytest.mark.parametrize("num_failures", [1, 3])
def test_calls_that_told_nothing_are_sent_again(
    server: ApiServer, kind: str, error: StatusError, num_failures: int
) -> None:
    params = SamplingParams(max_tokens=4)
    server.servicer.faults = [refuse(error)] * num_failures
    deltas, output, found = stream(kind, server.address, params)
    assert_whole(deltas, output, params, 1234)
    assert found.num_calls == num_failures + 1
    server.servicer.refusals = [error] * num_failures
    assert use(kind, server.address, lambda client: client.tokenize("ab")) == [97, 98]


@KINDS
@pytest.mark.parametrize(
    "error, num_calls",
    [
        pytest.param(StatusError.resource_exhausted("full", 0.001), 4, id="exhausted-at-last"),
        pytest.param(StatusError.unavailable("away"), 4, id="unavailable-at-last"),
        pytest.param(StatusError.not_found("no such model"), 1, id="not-found"),
        pytest.param(StatusError.aborted("lost", 5), 1, id="aborted"),
        pytest.param(StatusError.deadline_exceeded("too late"), 1, id="deadline"),
        pytest.param(StatusError.internal("abcd"), 1, id="internal"),
        pytest.param(StatusError.cancelled("gone"), 1, id="cancelled"),
    ],
)
def test_errors_reach_the_caller(server: ApiServer, kind: str, error: StatusError, num_calls: int) -> None:
    server.servicer.faults = [refuse(error)] * num_calls
    with pytest.raises(StatusError) as caught:
        stream(kind, server.address, SamplingParams())
    found = caught.value
    assert (found.code, found.message, found.details) == (error.code, error.message, error.details)
    assert (found.retry_after_s, found.last_offset) == (error.retry_after_s, error.last_offset)
    assert len(server.servicer.requests) == num_calls
    server.servicer.refusals = [error] * num_calls
    with pytest.raises(StatusError) as caught:
        use(kind, server.address, lambda client: client.server_load())
    assert caught.value.code is error.code


@KINDS
def test_what_only_the_server_refuses_is_named(server: ApiServer, kind: str) -> None:
    refusals = [
        InvalidRequestError("model", "b" * 500, "is not served"),
        InvalidRequestError("token_ids", 999, "at most 9"),
    ]
    server.servicer.faults = [refuse(InvalidFieldsError(refusals))]
    with pytest.raises(InvalidFieldsError) as caught:
        stream(kind, server.address, SamplingParams())
    assert [(p.field, p.limit) for p in caught.value.problems] == [
        ("model", "is not served"),
        ("token_ids", "at most 9"),
    ]
    assert "token_ids = 999: at most 9" in str(caught.value)


@KINDS
def test_a_hint_beyond_the_deadline_is_not_waited_for(server: ApiServer, kind: str) -> None:
    server.servicer.faults = [refuse(StatusError.resource_exhausted("full", 3600.0))]
    with pytest.raises(StatusError, match="full"):
        stream(kind, server.address, SamplingParams())
    assert len(server.servicer.requests) == 1


@KINDS
def test_deadlines_end_requests(server: ApiServer, kind: str) -> None:
    server.servicer.faults = [hang_after(2)]
    with pytest.raises(StatusError) as caught:
        stream(kind, server.address, SamplingParams(max_tokens=9), timeout_s=1.0)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@KINDS
def test_no_server_is_unavailable(kind: str) -> None:
    with pytest.raises(StatusError) as caught:
        stream(kind, "127.0.0.1:1", SamplingParams())
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert use(kind, "127.0.0.1:1", lambda client: client.health()) is False


def test_one_client_serves_many_threads(server: ApiServer) -> None:
    params = [SamplingParams(max_tokens=20, seed=seed) for seed in range(16)]
    with JetFlowClient(server.address, timeout_s=TIMEOUT_S) as client, ThreadPoolExecutor(16) as threads:
        outputs = list(threads.map(lambda p: client.generate(PROMPT, p), params))
    assert [output.token_ids for output in outputs] == [toy_tokens(PROMPT, seed, 20) for seed in range(16)]


def test_one_client_serves_many_tasks(server: ApiServer) -> None:
    async def run() -> list[RequestOutput]:
        async with AsyncJetFlowClient(server.address, timeout_s=TIMEOUT_S) as client:
            params = [SamplingParams(max_tokens=20, seed=seed) for seed in range(16)]
            return await asyncio.gather(*(client.generate(PROMPT, p) for p in params))

    outputs = asyncio.run(run())
    assert [output.token_ids for output in outputs] == [toy_tokens(PROMPT, seed, 20) for seed in range(16)]


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to hold within a minute")


@KINDS
def test_cancel_ends_the_request(server: ApiServer, kind: str) -> None:
    server.servicer.faults = [hang_after(4)]
    deltas, output, _ = stream(
        kind,
        server.address,
        SamplingParams(max_tokens=50),
        on_delta=lambda found, delta: found.cancel() if delta.offset == 3 else None,
    )
    assert output.finish_reason is FinishReason.ABORT
    assert output.token_ids == toy_tokens(PROMPT, 1234, len(output.token_ids))
    assert len(output.token_ids) == 6
    assert len(deltas) == 3
    wait_until(lambda: server.servicer.num_ended == 1)
    assert len(server.servicer.requests) == 1


def test_cancel_works_from_another_thread(server: ApiServer) -> None:
    server.servicer.faults = [hang_after(2)]
    with JetFlowClient(server.address) as client, client.stream(PROMPT, SamplingParams(max_tokens=9)) as found:
        next(found)
        threading.Timer(0.05, found.cancel).start()
        assert list(found) == []
        assert found.output.finish_reason is FinishReason.ABORT
    wait_until(lambda: server.servicer.num_ended == 1)


def test_leaving_a_stream_ends_the_request(server: ApiServer) -> None:
    server.servicer.faults = [hang_after(2), hang_after(2)]
    with JetFlowClient(server.address) as client:
        with client.stream(PROMPT, SamplingParams(max_tokens=9)) as found:
            next(found)
        wait_until(lambda: server.servicer.num_ended == 1)

    async def leave() -> None:
        async with AsyncJetFlowClient(server.address) as client:
            async with client.stream(PROMPT, SamplingParams(max_tokens=9)) as found:
                await anext(found)
            await asyncio.to_thread(wait_until, lambda: server.servicer.num_ended == 2)

    asyncio.run(leave())


def test_cancelling_the_task_ends_the_request(server: ApiServer) -> None:
    server.servicer.faults = [hang_after(2)]

    async def run() -> None:
        async with AsyncJetFlowClient(server.address) as client:
            task = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_tokens=9)))
            await asyncio.to_thread(wait_until, lambda: len(server.servicer.requests) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: server.servicer.num_ended == 1)

    asyncio.run(run())


@KINDS
def test_the_other_methods(server: ApiServer, kind: str) -> None:
    def ask(act: Callable[[Any], Any]) -> Any:
        return use(kind, server.address, act)

    assert ask(lambda client: client.abort("known-1", "other")) == ("known-1",)
    assert ask(lambda client: client.model_card()).vocab_size == 1000
    assert ask(lambda client: client.server_load()).replicas[0].healthy
    assert ask(lambda client: client.tokenize("ab")) == [97, 98]
    assert ask(lambda client: client.tokenize([{"role": "user", "content": "c"}])) == [99]
    assert ask(lambda client: client.detokenize([97, 98])) == "ab"
    assert ask(lambda client: client.health()) is True
    server.drain()
    assert ask(lambda client: client.health()) is False
    with pytest.raises(StatusError, match="'b' is not served"):
        ask(lambda client: client.model_card("b"))


@KINDS
def test_the_longest_prompt_fits_a_message(server: ApiServer, kind: str) -> None:
    prompt = [2**31 - 1] * MAX_TOKEN_IDS
    output = use(kind, server.address, lambda client: client.generate(prompt, SamplingParams(max_tokens=1)))
    assert output.usage.prompt_tokens == MAX_TOKEN_IDS


@pytest.mark.parametrize(
    "prompt, options, field",
    [
        pytest.param("", {}, "text", id="no-text"),
        pytest.param([], {}, "token_ids.ids", id="no-tokens"),
        pytest.param([-1], {}, "prompt", id="negative-token"),
        pytest.param([2**40], {}, "prompt", id="huge-token"),
        pytest.param(["a"], {}, "prompt", id="texts"),
        pytest.param([{"role": "user", "text": "x"}], {}, "prompt", id="chat-with-other-key"),
        pytest.param([{"role": "", "content": "x"}], {}, "chat.messages[0].role", id="no-role"),
        pytest.param("a\ud800", {}, "prompt", id="lone-surrogate"),
        pytest.param("a", {"request_id": "\n"}, "request_id", id="request-id"),
        pytest.param("a", {"model": 5}, "request", id="wrong-type"),
    ],
)
def test_requests_are_checked_before_they_are_sent(prompt: Any, options: dict[str, Any], field: str) -> None:
    with JetFlowClient("127.0.0.1:1") as client, pytest.raises(InvalidRequestError) as caught:
        client.stream(prompt, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("servers", [[], "", ["a:1", ""]], ids=["none", "empty", "one-empty"])
def test_clients_need_addresses(servers: Any) -> None:
    with pytest.raises(ValueError, match="servers"):
        JetFlowClient(servers)
