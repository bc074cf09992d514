"""Frames to a replica: what is in them, in which order, and how large they get."""

from __future__ import annotations

import asyncio

from jetflow_cluster.router.outbox import Outbox
from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES, MAX_TOKEN_ID, MAX_TOKEN_IDS
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from support.toy_cluster import run


def submit(name: str, num_tokens: int = 1, **sampling: object) -> rpb.Submit:
    params = pb.SamplingParams(**sampling)  # type: ignore[arg-type]
    return rpb.Submit(request_id=name, token_ids=[MAX_TOKEN_ID] * num_tokens, sampling=params)


def names(frame: rpb.RouterFrame) -> tuple[list[str], list[str]]:
    return [each.request_id for each in frame.submits], [each.request_id for each in frame.aborts]


def test_what_gathers_goes_out_together() -> None:
    async def test() -> None:
        box = Outbox("router-0")
        assert box.first_frame().hello.router_id == "router-0"
        for name in "abc":
            box.submit(submit(name))
        box.abort("earlier")
        assert names(await box.next_frame(60.0)) == (["a", "b", "c"], ["earlier"])
        assert names(await box.next_frame(0.01)) == ([], []), "a ping"

    run(test)


def test_a_frame_never_submits_and_aborts_one_request() -> None:
    async def test() -> None:
        box = Outbox("router-0")
        box.submit(submit("a"))
        box.submit(submit("b"))
        box.abort("a")
        assert names(await box.next_frame(60.0)) == (["b"], [])
        box.abort("b")
        assert names(await box.next_frame(60.0)) == ([], ["b"])

    run(test)


def test_frames_stay_within_what_a_replica_takes() -> None:
    async def test() -> None:
        box = Outbox("router-0")
        largest = submit("largest", MAX_TOKEN_IDS, prior_output_token_ids=[MAX_TOKEN_ID] * MAX_TOKEN_IDS)
        wordy = [submit(f"wordy-{i}", stop=["é" * 1024] * 32) for i in range(200)]
        sent: list[str] = []
        for each in (*wordy[:30], largest, *wordy[30:]):
            box.submit(each)
        while len(sent) < 201:
            frame = await box.next_frame(0.0)
            assert frame.ByteSize() < MAX_REQUEST_BYTES
            sent += names(frame)[0]
        assert sent[30] == "largest" and len(set(sent)) == 201

    run(test)


def test_behind_a_break_only_aborts_are_left() -> None:
    async def test() -> None:
        box = Outbox("router-0")
        box.submit(submit("a"))
        box.abort("b")
        box.reset(aborts=["c"])
        assert names(box.first_frame()) == ([], ["c"])
        waiting = asyncio.create_task(box.next_frame(60.0))
        await asyncio.sleep(0)
        box.submit(submit("d"))
        assert names(await waiting) == (["d"], [])

    run(test)
