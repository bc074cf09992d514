"""A router's stream over gRPC: the engine's own tokens, aborts, broken streams."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.convert import logprobs_from_proto, matched_stop_from_proto, sampling_to_proto
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.types import RequestOutput
from support.replica_client import Heard, RouterStream, replica_server, until

PROMPTS = [[1, 2, 3], [70] * 30, [9], [20, 30, 40, 50, 60], list(range(60, 90)), [5] * 9]
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


def _params(**given: Any) -> SamplingParams:
    speculation = SpeculationOptions(mode="force", max_tree_nodes=8)
    return SamplingParams(**({"max_tokens": 20, "temperature": 0.0, "seed": 1, "speculation": speculation} | given))


def _is_idle(frontend: EngineFrontend) -> Callable[[], bool]:
    def holds() -> bool:
        stats = frontend.engine.stats()
        return (stats.num_used_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)

    return holds


def _check(heard: Heard, expected: RequestOutput, prior: int = 0) -> None:
    started, finished = heard.started, heard.finished
    assert started is not None and finished is not None
    assert (started.seed, started.prompt_tokens) == (expected.seed, len(expected.prompt_token_ids))
    assert heard.token_ids == expected.token_ids[prior:]
    assert expected.text.endswith(heard.text) if prior else heard.text == expected.text
    assert pb.FinishReason.Name(finished.finish_reason) == f"FINISH_REASON_{expected.finish_reason.upper()}"
    assert matched_stop_from_proto(finished) == expected.matched_stop
    assert finished.usage.completion_tokens == expected.usage.completion_tokens
    stats = finished.speculation
    assert sum(stats.acceptance_histogram) == stats.num_spec_steps
    assert sum(k * n for k, n in enumerate(stats.acceptance_histogram)) == stats.num_accepted_draft_tokens
    assert 0.0 <= finished.timing.queue_s <= finished.timing.time_to_first_token_s <= finished.timing.total_s
    if expected.logprobs is not None:
        logprobs = logprobs_from_proto(entry for delta in heard.deltas for entry in delta.logprobs)
        assert [entry.token_id for entry in logprobs] == heard.token_ids
        for ours, theirs in zip(logprobs, expected.logprobs[-len(logprobs) :], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    if expected.prompt_logprobs is not None:
        found = logprobs_from_proto(finished.prompt_logprobs)
        assert [e.token_id for e in found] == expected.prompt_token_ids[1:]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 11, "top_p": 0.9, "presence_penalty": 0.3}, id="sampled"),
        pytest.param({"temperature": 0.8, "seed": 2, "stop": ("a", "5"), "min_tokens": 2}, id="stop-strings"),
        pytest.param({"stop_token_ids": list(range(0, 280, 7))}, id="stop-tokens"),
        pytest.param({"logprobs": 2, "prompt_logprobs": 1}, id="logprobs"),
        pytest.param({"speculation": SpeculationOptions(mode="off")}, id="without-trees"),
        pytest.param({"prior_output_token_ids": [40, 50, 60], "logprobs": 0}, id="resumed"),
    ],
)
def test_streams_are_those_of_the_engine(frontend: EngineFrontend, local: LLM, given: dict[str, Any]) -> None:
    params = _params(**given)
    prior = len(params.prior_output_token_ids)
    expected = local.generate(PROMPTS, params)

    async def run() -> list[Heard]:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            for i, prompt in enumerate(PROMPTS):
                router.submit(f"r{i}", prompt, params)
            return await router.ended(*(f"r{i}" for i in range(len(PROMPTS))))

    for heard, output in zip(asyncio.run(run()), expected, strict=True):
        _check(heard, output, prior)
        assert all(delta.seq_offset >= prior for delta in heard.deltas)


def test_two_routers_at_once(frontend: EngineFrontend, local: LLM) -> None:
    samplings = [_params(temperature=1.0, seed=seed) for seed in range(8)]
    expected = local.generate([PROMPTS[seed % 6] for seed in range(8)], samplings)

    async def run() -> None:
        async with (
            replica_server(frontend) as server,
            RouterStream(server.port, "a") as a,
            RouterStream(server.port, "b") as b,
        ):
            for seed, params in enumerate(samplings):
                (a, b)[seed % 2].submit(f"r{seed}", PROMPTS[seed % 6], params)
            for router, seeds in ((a, range(0, 8, 2)), (b, range(1, 8, 2))):
                for heard, seed in zip(await router.ended(*(f"r{s}" for s in seeds)), seeds, strict=True):
                    _check(heard, expected[seed])
            assert set(a.heard).isdisjoint(b.heard)
            # One frame holds a step's events of all requests of its router.
            assert any(len(frame.events) > 1 for frame in a.frames)

    asyncio.run(run())


@pytest.mark.parametrize("by", ["own", "another"])
def test_abort(frontend: EngineFrontend, by: str) -> None:
    async def run() -> None:
        async with (
            replica_server(frontend) as server,
            RouterStream(server.port, "a") as a,
            RouterStream(server.port, "b") as b,
        ):
            a.submit("x", [1, 2], LONG)
            a.submit("y", [3], _params())
            await a.begun("x")
            (a if by == "own" else b).abort("x", "unknown")
            (aborted,) = await a.ended("x")
            assert aborted.finished is not None
            assert aborted.finished.finish_reason == pb.FINISH_REASON_ABORT
            assert aborted.finished.usage.completion_tokens == len(aborted.token_ids) < 400
            await a.ended("y")
            assert not b.heard
            # The name is free again.
            a.heard.clear()
            a.submit("x", [1, 2], _params())
            await a.ended("x")

    asyncio.run(run())


def test_two_hundred_aborts_behind_a_delta(frontend: EngineFrontend) -> None:
    """Each is sent at the moment that some delta of its request is read."""
    rng = random.Random(5)

    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            left = {f"r{i}": rng.randint(1, 4) for i in range(200)}

            def abort_when_due(request_id: str, delta: pb.Delta) -> None:
                left[request_id] -= 1
                if left[request_id] == 0:
                    router.abort(request_id)

            router.on_delta = abort_when_due
            for name in left:
                router.submit(name, [rng.randrange(250) for _ in range(rng.randint(1, 20))], LONG)
            ended = await router.ended(*left)
            assert {heard.finished.finish_reason for heard in ended if heard.finished} == {pb.FINISH_REASON_ABORT}
            assert all(len(heard.token_ids) < 400 for heard in ended)
            await until(_is_idle(frontend), 5.0)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["vanishes", "half-closes"])
def test_a_broken_stream_frees_its_work(frontend: EngineFrontend, caplog: Any, how: str) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port, "stays") as stays:
            goes = RouterStream(server.port, "goes")
            async with goes:
                for i in range(10):
                    goes.submit(f"g{i}", [i], LONG)
                stays.submit("s", [1, 2], dataclasses.replace(LONG, max_tokens=100))
                await goes.begun("g0", "g9")
                if how == "half-closes":
                    await goes.call.done_writing()
                    assert await goes.closed() is grpc.StatusCode.OK
            steps = frontend.engine.num_steps
            await until(lambda: frontend.engine.stats().num_running <= 1)
            # Within a step, and what it took for the news to arrive.
            assert frontend.engine.num_steps - steps < 50
            (heard,) = await stays.ended("s")
            assert len(heard.token_ids) == 100

    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_router_that_returns_within_its_grace(frontend: EngineFrontend, local: LLM) -> None:
    params = dataclasses.replace(LONG, max_tokens=60, temperature=1.0, seed=9)
    (expected,) = local.generate([[1, 2, 3]], params)

    async def run() -> None:
        async with replica_server(frontend) as server:
            async with RouterStream(server.port, "a", grace_ms=60_000) as first:
                first.submit("x", [1, 2, 3], params)
                first.submit("y", [4], LONG)
                await first.begun("x", "y")
            before = first.heard["x"]
            await until(lambda: frontend.engine.num_steps > 0 and bool(frontend.engine.requests))
            async with RouterStream(server.port, "a") as second:
                second.submit("x", [1, 2, 3], dataclasses.replace(params, prior_output_token_ids=before.token_ids))
                (after,) = await second.ended("x")
                assert before.token_ids + after.token_ids == expected.token_ids
                assert before.text + after.text == expected.text
                second.abort("y")
                await until(_is_idle(frontend))
                assert set(second.heard) == {"x"}

    asyncio.run(run())


def test_grace_ends(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server:
            async with RouterStream(server.port, "a", grace_ms=200) as router:
                router.submit("x", [1, 2, 3], LONG)
                await router.begun("x")
            await until(_is_idle(frontend))

    asyncio.run(run())


def test_attaching_again_ends_the_earlier_stream(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port, "a") as first:
            first.submit("x", [1, 2, 3], LONG)
            await first.begun("x")
            async with RouterStream(server.port, "a") as second:
                assert await first.closed() is grpc.StatusCode.UNAVAILABLE
                second.submit("x", [1, 2, 3], _params())
                (heard,) = await second.ended("x")
                assert len(heard.token_ids) == 20 or heard.finished.finish_reason == pb.FINISH_REASON_STOP

    asyncio.run(run())


def test_a_deadline_aborts(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            router.submit("x", [1], dataclasses.replace(LONG, max_tokens=500), timeout_ms=60)
            router.submit("y", [1], _params(), timeout_ms=600_000)
            late, fine = await router.ended("x", "y")
            assert late.finished.finish_reason == pb.FINISH_REASON_ABORT
            assert fine.finished.finish_reason != pb.FINISH_REASON_ABORT

    asyncio.run(run())


def test_heartbeats_while_idle_cost_little(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend, heartbeat_s=0.1) as server, RouterStream(server.port) as router:
            await router.wait(lambda: bool(router.frames))
            count, before, began = len(router.frames), time.process_time(), time.monotonic()
            await router.wait(lambda: len(router.frames) >= count + 12)
            took = time.monotonic() - began
            # This process is router and replica at once.
            assert time.process_time() - before < 0.1 + 0.1 * took
            assert took > 1.0, "no more often than asked for"
            for frame in router.frames:
                assert not frame.events
                assert frame.load.healthy and not frame.load.draining
                assert frame.load.num_free_pages + frame.load.num_cached_pages == frame.load.num_pages == 96

    asyncio.run(run())


def test_load_is_told_under_load(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            sampling = sampling_to_proto(dataclasses.replace(LONG, max_tokens=40))
            submits = [rpb.Submit(request_id=f"r{i}", token_ids=[i], sampling=sampling) for i in range(20)]
            router.send(rpb.RouterFrame(submits=submits))
            await router.ended(*(f"r{i}" for i in range(20)))
            loads = [frame.load for frame in router.frames if frame.events and frame.HasField("load")]
            assert max(load.num_running for load in loads) == 16
            assert max(load.outstanding_tokens for load in loads) > 400
            await router.wait(lambda: router.frames[-1].load.outstanding_tokens == 0 and not router.frames[-1].events)
            assert router.frames[-1].load.tokens_per_s > 0

    asyncio.run(run())
