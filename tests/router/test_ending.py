"""However a request ends early, its replica stops working on it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest

from jetflow_cluster.router.ports import is_free
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import SamplingParams
from support.toy_cluster import PROMPT, Cluster, Seen, cluster, failure, request, run, stream, until
from support.toy_replica import Fault, toy_tokens

SLOW = {"step_s": 0.01}
LONG = 2000


async def begun(made: Cluster, message: pb.GenerateRequest, router: int = 0, num_deltas: int = 1) -> tuple[Any, Seen]:
    """A call that delivered something."""
    call, seen = made.routers[router].stub.GenerateStream(message), Seen()
    while len(seen.deltas) < num_deltas:
        seen.take(await call.read())
    return call, seen


async def rest(call: Any, seen: Seen) -> Seen:
    """Reads the call to its end."""
    while (event := await call.read()) is not grpc.aio.EOF:
        seen.take(event)
    return seen


def check_aborted(seen: Seen) -> None:
    """The stream ended as an aborted one does."""
    assert seen.finished is not None
    assert seen.finished.finish_reason == pb.FINISH_REASON_ABORT
    assert seen.finished.usage.completion_tokens == len(seen.token_ids)
    assert seen.token_ids == toy_tokens(PROMPT, 7, len(seen.token_ids))


def test_calls_cancelled_right_after_a_delta_leave_nothing() -> None:
    async def test() -> None:
        async with cluster(replica={"step_s": 0.001}) as made:

            async def one(index: int) -> None:
                call, _ = await begun(made, request(LONG, seed=index), num_deltas=1 + index % 3)
                call.cancel()

            for first in range(0, 200, 20):
                await asyncio.gather(*(one(index) for index in range(first, first + 20)))
            await made.is_clean()
            submitted = {submit.request_id for replica in made.replicas for submit in replica.submits}
            aborted = {name for replica in made.replicas for name in replica.aborts}
            assert len(submitted) == made.num_submits == 200 and aborted == submitted

    run(test)


@pytest.mark.parametrize("moment", ["before anything", "waiting", "between deltas", "unary"])
def test_a_cancelled_call_ends_on_the_replica(moment: str) -> None:
    async def test() -> None:
        steps = {"step_s": 30.0} if moment == "between deltas" else SLOW
        limit = {"max_replica_tokens": 1} if moment == "waiting" else {}
        async with cluster(1, replica=steps, **limit) as made:
            if moment == "waiting":
                ahead, _ = await begun(made, request(LONG))
            if moment == "unary":
                call = made.stub.GenerateOnce(request(LONG))
                await until(lambda: made.running)
            elif moment == "between deltas":
                call, _ = await begun(made, request(LONG))
            else:
                call = made.stub.GenerateStream(request(LONG))
                if moment == "waiting":
                    await until(lambda: made.routers[0].server.load().num_queued)
            call.cancel()
            if moment == "waiting":
                await until(lambda: made.routers[0].server.num_running == 1)
                assert made.num_submits == 1 and made.routers[0].server.load().num_queued == 0
                ahead.cancel()
            await made.is_clean()

    run(test)


def test_a_client_that_vanishes_ends_its_requests() -> None:
    async def test() -> None:
        async with cluster(1, replica=SLOW) as made:
            async with grpc.aio.insecure_channel(made.routers[0].address) as channel:
                method = channel.unary_stream(
                    "/jetflow.inference.v1.JetFlowInference/GenerateStream",
                    request_serializer=pb.GenerateRequest.SerializeToString,
                    response_deserializer=pb.GenerateEvent.FromString,
                )
                calls = [method(request(LONG, seed=seed)) for seed in range(5)]
                await until(lambda: len(made.running) == 5)
                assert len(calls) == 5
            await made.is_clean()

    run(test)


@pytest.mark.parametrize("kind", ["timeout_ms", "call", "both"])
@pytest.mark.parametrize("state", ["running", "waiting", "frozen"])
def test_the_earlier_deadline_ends_a_request(state: str, kind: str) -> None:
    async def test() -> None:
        limit = {"max_replica_tokens": 1} if state == "waiting" else {}
        async with cluster(1, replica=SLOW, **limit) as made:
            options = {"timeout_ms": 400} if kind != "call" else {}
            call_options = {"timeout": {"call": 0.4, "both": 60.0}.get(kind)}
            ahead = None
            if state == "waiting":
                ahead, _ = await begun(made, request(LONG))
            if state == "frozen":
                made.replicas[0].faults.append(Fault("freeze", 2))
            error = await failure(stream(made.stub, request(LONG, **options), **call_options))
            assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
            if ahead is not None:
                ahead.cancel()
                assert len(made.replicas[0].submits) == 1
            else:
                # gRPC rounds a deadline up.
                assert 0 < made.replicas[0].submits[0].timeout_ms <= 401
            await until(lambda: not made.running)

    run(test)


@pytest.mark.parametrize("request_id", ["", "mine"])
@pytest.mark.parametrize("router", [0, 1])
def test_abort_through_any_router(router: int, request_id: str) -> None:
    async def test() -> None:
        async with cluster(num_routers=2, replica=SLOW) as made:
            call, seen = await begun(made, request(LONG, request_id=request_id))
            assert seen.started is not None
            name = seen.started.request_id
            answer = await made.routers[router].stub.AbortRequest(
                pb.AbortRequestRequest(request_ids=[name, "unknown", name, "a:b:c"])
            )
            assert (list(answer.aborted_ids), list(answer.unknown_ids)) == ([name], ["unknown", "a:b:c"])
            check_aborted(await rest(call, seen))
            await made.is_clean()

    run(test)


def test_a_request_of_a_router_that_is_gone_is_ended_on_the_replica() -> None:
    async def test() -> None:
        async with cluster(num_routers=2, replica=SLOW) as made:
            call, seen = await begun(made, request(LONG))
            made.routers[1].server.set_peers({})
            assert seen.started is not None
            ids = [seen.started.request_id]
            answer = await made.routers[1].stub.AbortRequest(pb.AbortRequestRequest(request_ids=ids))
            assert list(answer.unknown_ids) == ids
            check_aborted(await rest(call, seen))
            await made.is_clean()

    run(test)


def test_a_waiting_request_can_be_aborted() -> None:
    async def test() -> None:
        async with cluster(1, replica=SLOW, max_replica_tokens=1) as made:
            ahead, _ = await begun(made, request(LONG))
            waiting = asyncio.create_task(failure(stream(made.stub, request(LONG, request_id="waits"))))
            await until(lambda: made.routers[0].server.load().num_queued)
            answer = await made.stub.AbortRequest(pb.AbortRequestRequest(request_ids=["waits"]))
            assert list(answer.aborted_ids) == ["waits"]
            assert (await waiting).code is grpc.StatusCode.CANCELLED
            ahead.cancel()
            await made.is_clean()

    run(test)


@pytest.mark.parametrize("fault", ["freeze", "break"])
def test_an_abort_does_not_wait_for_a_replica_that_says_nothing(fault: str) -> None:
    async def test() -> None:
        async with cluster(1, replica=SLOW, abort_grace_s=0.2) as made:
            made.replicas[0].faults.append(Fault("freeze", 5))
            call, seen = await begun(made, request(LONG))
            await until(lambda: made.replicas[0].frozen)
            assert seen.started is not None
            ids = [seen.started.request_id]
            aborted = asyncio.create_task(rest(call, seen))
            await made.stub.AbortRequest(pb.AbortRequestRequest(request_ids=ids))
            if fault == "break":
                made.replicas[0].break_streams()
            check_aborted(await aborted)

    run(test)


def test_the_queue_is_bounded_and_serves_in_order() -> None:
    async def test() -> None:
        cost = len(PROMPT) + 30
        async with cluster(1, replica=SLOW, max_replica_tokens=cost, max_queued_tokens=3 * cost + 9) as made:
            order: list[int] = []

            async def one(index: int) -> None:
                message = request(30, seed=index)
                (await stream(made.stub, message)).check(message)
                order.append(index)

            tasks = []
            for index in range(4):
                tasks.append(asyncio.create_task(one(index)))
                await until(lambda n=index: made.routers[0].server.num_running == n + 1)
                await until(lambda n=index: made.num_submits + made.routers[0].server.load().num_queued == n + 1)
            error = await failure(stream(made.stub, request(30)))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s
            error = await failure(stream(made.stub, request(1, timeout_ms=1)))
            assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.gather(*tasks)
            assert order == [0, 1, 2, 3]
            assert [submit.sampling.seed for submit in made.replicas[0].submits] == order
            await made.is_clean()

    run(test)


def test_a_port_goes_from_router_to_router_without_a_gap() -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.005}, share_ports=True) as made:
            first = made.routers[0]
            second = RouterServer(
                dataclasses.replace(first.server.config, router_id="router-1", port=first.server.port)
            )
            async with AsyncJetFlowClient(first.address) as client:

                async def short(seed: int) -> None:
                    found = await client.generate(PROMPT, SamplingParams(max_tokens=6, seed=seed))
                    assert found.token_ids == toy_tokens(PROMPT, seed, 6)

                running = [asyncio.create_task(stream(made.stub, request(600, seed=i))) for i in range(4)]
                await until(lambda: len(made.running) == 4)
                assert not is_free("127.0.0.1", first.server.port)
                await second.start()
                second.set_replicas({made.replicas[0].replica_id: made.replicas[0].address})
                await until(lambda: second.is_serving)
                await short(0)
                leaving = asyncio.create_task(first.server.hand_over(60))
                # gRPC itself ends calls that cross the end of their connection; the client takes it for what it is.
                for first_seed in range(0, 80, 8):
                    await asyncio.gather(*(short(first_seed + i) for i in range(8)))
                for seed, task in enumerate(running):
                    (await task).check(request(600, seed=seed))
                assert await leaving
                await second.stop()

    run(test)
