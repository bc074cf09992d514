"""A router that reads slowly, or not at all, costs bounded memory and nobody else's time."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest

from jetflow_cluster import SamplingParams
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.events import num_bytes_of
from jetflow_cluster.cluster.replica.session import RouterSession
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.convert import sampling_to_proto
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from support.replica_client import WAIT_S, RouterStream, replica_server, until

# Log-probabilities fill a connection's windows soon.
WIDE = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True, logprobs=64)


def _event(i: int, num_tokens: int = 1, num_top: int = 0) -> rpb.ReplicaEvent:
    top = [pb.TopLogprob(token_id=2**20 + k, logprob=-1.5) for k in range(num_top)]
    logprobs = [pb.TokenLogprobs(token_id=2**30, logprob=-0.5, top=top)] * num_tokens if num_top else []
    delta = pb.Delta(seq_offset=i, token_ids=[2**30] * num_tokens, text="€" * num_tokens, logprobs=logprobs)
    return rpb.ReplicaEvent(request_id="r" * 128, delta=delta)


def _session(**options: Any) -> RouterSession:
    return RouterSession("a", "a/1", 0.0, ReplicaServerConfig(**options), lambda: pb.ReplicaLoad(healthy=True))


class Writer:
    """Takes frames while it is allowed to."""

    def __init__(self) -> None:
        self.frames: list[rpb.ReplicaFrame] = []
        self.may_write = asyncio.Event()
        self.is_writing = asyncio.Event()

    async def __call__(self, frame: rpb.ReplicaFrame) -> None:
        self.is_writing.set()
        await self.may_write.wait()
        self.frames.append(frame)


def test_what_comes_during_a_write_goes_into_one_frame() -> None:
    async def run() -> list[rpb.ReplicaFrame]:
        session, writer = _session(heartbeat_s=100.0), Writer()
        task = asyncio.create_task(session.write_to(writer))
        await writer.is_writing.wait()
        for step in range(50):
            session.put([_event(2 * step), _event(2 * step + 1)], step)
        session.close()
        session.put([_event(1000)], 50)
        writer.may_write.set()
        await asyncio.wait_for(task, WAIT_S)
        assert not session.is_open
        return writer.frames

    first, merged = asyncio.run(run())
    assert not first.events and first.load.healthy
    assert merged.step == 49
    assert [event.delta.seq_offset for event in merged.events] == list(range(100))


@pytest.mark.parametrize("max_frame_bytes, most", [(2000, 2), (100_000, 100)])
def test_frames_are_divided_where_they_would_grow_too_large(max_frame_bytes: int, most: int) -> None:
    async def run() -> list[rpb.ReplicaFrame]:
        session, writer = _session(max_frame_bytes=max_frame_bytes), Writer()
        session.put((_event(i, num_tokens=10, num_top=2) for i in range(100)), 1)
        session.close()
        writer.may_write.set()
        await asyncio.wait_for(session.write_to(writer), WAIT_S)
        return writer.frames

    frames = asyncio.run(run())
    assert [event.delta.seq_offset for frame in frames for event in frame.events] == list(range(100))
    assert all(len(frame.events) == 1 or frame.ByteSize() <= max_frame_bytes for frame in frames)
    assert max(len(frame.events) for frame in frames) <= most


@pytest.mark.parametrize("num_tokens, num_top", [(0, 0), (1, 0), (500, 0), (1, 64), (300, 5)])
def test_sizes_are_not_underrated(num_tokens: int, num_top: int) -> None:
    event = _event(2**30, num_tokens, num_top)
    assert event.ByteSize() <= num_bytes_of(event)
    prompt_logprobs = event.delta.logprobs
    finished = rpb.ReplicaEvent(request_id="r" * 128, finished=pb.Finished(prompt_logprobs=prompt_logprobs))
    assert finished.ByteSize() <= num_bytes_of(finished)


@pytest.mark.parametrize(
    "options, num_events",
    [
        pytest.param({"max_pending_events": 100, "stall_timeout_s": 1000.0}, 101, id="too-much"),
        pytest.param({"max_pending_events": 100, "stall_timeout_s": 0.05}, 100, id="too-long"),
    ],
)
def test_who_does_not_read_is_left(options: dict[str, Any], num_events: int) -> None:
    async def run() -> None:
        session, writer = _session(**options), Writer()
        task = asyncio.create_task(session.write_to(writer))
        await writer.is_writing.wait()
        for i in range(num_events):
            session.put([_event(i)], i)
        with pytest.raises(StatusError) as raised:
            await asyncio.wait_for(task, WAIT_S)
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        assert not session.is_open
        session.put([_event(0)])
        assert not session._events, "nothing is kept for nobody"

    asyncio.run(run())


async def _rest(router: RouterStream) -> tuple[int, grpc.StatusCode]:
    """Tokens that a stream still gives, and how it ends."""
    num_tokens = 0
    try:
        async for frame in router.call:
            num_tokens += sum(len(event.delta.token_ids) for event in frame.events)
    except grpc.aio.AioRpcError as error:
        return num_tokens, error.code()
    return num_tokens, grpc.StatusCode.OK


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"stall_timeout_s": 3.0}, id="too-long"),
        pytest.param({"max_pending_events": 500, "stall_timeout_s": 1000.0}, id="too-much"),
    ],
)
def test_a_reader_that_stops_slows_nobody(frontend: EngineFrontend, options: dict[str, Any]) -> None:
    async def run() -> None:
        async with (
            replica_server(frontend, **options) as server,
            RouterStream(server.port, "stops", reads=False) as stops,
            RouterStream(server.port, "reads") as reads,
        ):
            submits = [
                rpb.Submit(request_id=f"s{i}", token_ids=[i], sampling=sampling_to_proto(WIDE)) for i in range(60)
            ]
            stops.send(rpb.RouterFrame(submits=submits[:8]))
            await until(lambda: bool(frontend.engine.requests))
            for i in range(8):
                reads.submit(f"r{i}", [i], dataclasses.replace(WIDE, logprobs=None, max_tokens=40))
            stops.send(rpb.RouterFrame(submits=submits[8:]))
            for heard in await reads.ended(*(f"r{i}" for i in range(8))):
                assert len(heard.token_ids) == 40
            # The connection's windows fill up, the stream is given up, and its work with it.
            await until(lambda: not frontend.engine.requests)
            reads.submit("last", [1], dataclasses.replace(WIDE, logprobs=None, max_tokens=10))
            await reads.ended("last")
            num_tokens, code = await _rest(stops)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert num_tokens < 60 * 400

    asyncio.run(run())
