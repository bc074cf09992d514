"""Streams that break go on, and what cannot be right is an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.retry import RetryPolicy
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import RequestDelta, SamplingParams
from support.api_client import KINDS, PROMPT, assert_whole, stream
from support.api_server import ApiServer, api_server, fail_after, hang_after, rewrite, toy_text, toy_tokens


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


@KINDS
@pytest.mark.parametrize("broken_after", range(1, 7))
@pytest.mark.parametrize("error", [StatusError.unavailable("gone"), None], ids=["unavailable", "ended-early"])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_broken_stream_goes_on(
    server: ApiServer, kind: str, broken_after: int, error: Exception | None, seed: int | None
) -> None:
    params = SamplingParams(max_tokens=9, seed=seed, logprobs=0)
    server.servicer.faults = [fail_after(broken_after, error)]
    deltas, output, found = stream(kind, server.address, params)
    assert_whole(deltas, output, params, 1234 if seed is None else seed)
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert found.num_calls == 2
    resumed = server.servicer.requests[1].sampling
    assert resumed.seed == output.seed
    assert list(resumed.prior_output_token_ids) == output.token_ids[: len(resumed.prior_output_token_ids)]


@KINDS
def test_a_stream_may_break_many_times_while_it_gets_on(server: ApiServer, kind: str) -> None:
    params = SamplingParams(max_tokens=30)
    server.servicer.faults = [fail_after(2, StatusError.unavailable("gone")) for _ in range(12)]
    deltas, output, found = stream(kind, server.address, params)
    assert_whole(deltas, output, params, 1234)
    assert found.num_calls == 13


@KINDS
def test_prior_tokens_of_the_caller_are_kept_over_a_break(server: ApiServer, kind: str) -> None:
    expected = toy_tokens(PROMPT, 3, 12)
    params = SamplingParams(max_tokens=12, seed=3, prior_output_token_ids=expected[:4])
    server.servicer.faults = [fail_after(3, StatusError.unavailable("gone"))]
    deltas, output, _ = stream(kind, server.address, params)
    assert output.token_ids == expected
    assert deltas[0].offset == 4
    assert output.text == toy_text(expected[3:])


@KINDS
def test_a_killed_server_is_replaced_by_the_next(kind: str) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0)
    with api_server() as second:
        first = ApiServer()
        first.servicer.faults = [hang_after(4)]
        killers: list[threading.Thread] = []

        def kill(found: Any, delta: RequestDelta) -> None:
            if delta.offset == 3:
                killers.append(threading.Thread(target=first.stop))
                killers[0].start()

        try:
            deltas, output, found = stream(kind, [first.address, second.address], params, on_delta=kill)
        finally:
            first.stop() if not killers else killers[0].join()
        assert_whole(deltas, output, params, 1234)
        assert found.num_calls == 2
        assert len(second.servicer.requests) == 1


def changed(event: pb.GenerateEvent, **fields: Any) -> pb.GenerateEvent:
    found = pb.GenerateEvent()
    found.CopyFrom(event)
    for path, value in fields.items():
        part, name = path.split("__")
        setattr(getattr(found, part), name, value)
    return found


@KINDS
@pytest.mark.parametrize(
    "fault, message",
    [
        pytest.param(rewrite(2, lambda e: [e, e]), "begins at token 1 and not at 3", id="delta-twice"),
        pytest.param(rewrite(2, lambda e: []), "begins at token 3 and not at 1", id="delta-missing"),
        pytest.param(rewrite(4, lambda e: []), "6 tokens came, and the server counts 7", id="last-delta-missing"),
        pytest.param(rewrite(0, lambda e: []), "before the stream began", id="not-started"),
        pytest.param(rewrite(0, lambda e: [e, e]), "began twice", id="started-twice"),
        pytest.param(
            rewrite(5, lambda e: [changed(e, finished__finish_reason=9)]), "finish_reason = 9", id="unknown-reason"
        ),
    ],
)
def test_what_cannot_be_right_is_an_error(server: ApiServer, kind: str, fault: Any, message: str) -> None:
    server.servicer.faults = [fault]
    with pytest.raises(StatusError, match=message) as caught:
        stream(kind, server.address, SamplingParams(max_tokens=7))
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


@KINDS
@pytest.mark.parametrize(
    "fault, message",
    [
        pytest.param(rewrite(0, lambda e: [changed(e, started__seed=9)]), "seed is 9", id="seed"),
        pytest.param(rewrite(0, lambda e: [changed(e, started__model="b")]), "model is 'b'", id="model"),
        pytest.param(rewrite(0, lambda e: [changed(e, started__prompt_tokens=1)]), "prompt_tokens is 1", id="prompt"),
        pytest.param(rewrite(1, lambda e: [changed(e, delta__seq_offset=0)]), "at token 0 and not at 3", id="offset"),
    ],
)
def test_a_stream_that_goes_on_as_another_is_an_error(server: ApiServer, kind: str, fault: Any, message: str) -> None:
    server.servicer.faults = [fail_after(3, StatusError.unavailable("gone")), fault]
    with pytest.raises(StatusError, match=message) as caught:
        stream(kind, server.address, SamplingParams(max_tokens=7))
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


@KINDS
def test_a_last_token_that_differs_when_repeated_is_an_error(server: ApiServer, kind: str) -> None:
    def other(event: pb.GenerateEvent) -> list[pb.GenerateEvent]:
        found = changed(event)
        found.delta.token_ids[0] += 1
        return [found]

    server.servicer.faults = [fail_after(4), rewrite(1, other)]
    with pytest.raises(StatusError, match="token 5 differs"):
        stream(kind, server.address, SamplingParams(max_tokens=6))


@KINDS
def test_streams_resume_only_as_long_as_they_may(server: ApiServer, kind: str) -> None:
    never = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.01, resume_timeout_s=0.0)
    server.servicer.faults = [fail_after(3, StatusError.unavailable("gone"))]
    with pytest.raises(StatusError, match="gone"):
        stream(kind, server.address, SamplingParams(max_tokens=9), retry=never)


@KINDS
def test_aborted_in_mid_stream_is_told_with_what_came(server: ApiServer, kind: str) -> None:
    server.servicer.faults = [fail_after(3, StatusError.aborted("no replica is left", 3))]
    with pytest.raises(StatusError) as caught:
        stream(kind, server.address, SamplingParams(max_tokens=9))
    assert (caught.value.code, caught.value.last_offset) == (grpc.StatusCode.ABORTED, 3)
