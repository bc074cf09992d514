"""What a router's stream is refused, and how: by field where it is one request, by status where it is the stream."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest

from jetflow_cluster import SamplingParams
from jetflow_cluster.cluster.replica.servicer import ReplicaServicer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.convert import sampling_to_proto
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from support.replica_client import RouterStream, replica_server

PARAMS = SamplingParams(max_tokens=20, temperature=0.0, seed=1, ignore_eos=True)


def _submit(**changes: Any) -> rpb.Submit:
    submit = rpb.Submit(request_id="bad", token_ids=[1, 2], sampling=sampling_to_proto(PARAMS))
    for path, value in changes.items():
        message: Any = submit
        *parents, name = path.split("__")
        for parent in parents:
            message = getattr(message, parent)
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return submit


@pytest.mark.parametrize(
    "submit, field",
    [
        pytest.param(_submit(request_id=""), "request_id", id="no-id"),
        pytest.param(_submit(request_id="ü"), "request_id", id="odd-id"),
        pytest.param(_submit(request_id="running"), "request_id", id="duplicate-id"),
        pytest.param(_submit(token_ids=[]), "token_ids.ids", id="no-prompt"),
        pytest.param(_submit(token_ids=[1, 999]), "prompt", id="unknown-token"),
        pytest.param(_submit(token_ids=[1] * 600), "prompt", id="too-long"),
        pytest.param(_submit(timeout_ms=0), "timeout_ms", id="no-time"),
        pytest.param(_submit(sampling__temperature=-1.0), "sampling.temperature", id="temperature"),
        pytest.param(_submit(sampling__temperature=float("nan")), "sampling.temperature", id="nan"),
        pytest.param(_submit(sampling__max_tokens=0), "sampling.max_tokens", id="no-output"),
        pytest.param(_submit(sampling__stop=[""]), "sampling.stop", id="empty-stop"),
        pytest.param(_submit(sampling__stop_token_ids=[288]), "sampling.stop_token_ids", id="unknown-stop-token"),
        pytest.param(
            _submit(sampling__prior_output_token_ids=[1] * 21), "sampling.prior_output_token_ids", id="prior-above-max"
        ),
        pytest.param(_submit(sampling__speculation__mode=77), "sampling.speculation.mode", id="unknown-mode"),
        pytest.param(
            _submit(sampling__prompt_logprobs=64, token_ids=[1] * 100), "sampling.prompt_logprobs", id="huge-answer"
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(frontend: EngineFrontend, submit: rpb.Submit, field: str) -> None:
    async def run() -> None:
        async with (
            replica_server(frontend, max_frame_bytes=100_000) as server,
            RouterStream(server.port, "a") as a,
            RouterStream(server.port, "b") as b,
        ):
            a.submit("running", [1, 2], dataclasses.replace(PARAMS, max_tokens=400))
            await a.begun("running")
            b.send(rpb.RouterFrame(submits=[submit, _submit(request_id="good")]))
            (heard,) = await b.ended(submit.request_id)
            assert heard.refused is not None and heard.started is None
            assert heard.refused.code == rpb.REFUSAL_CODE_INVALID
            assert heard.refused.field == field
            assert heard.refused.limit
            # Neither its neighbour nor the stream is touched.
            (good,) = await b.ended("good")
            assert good.finished is not None
            a.abort("running")
            await a.ended("running")

    asyncio.run(run())


@pytest.mark.parametrize(
    "frames, code, told",
    [
        pytest.param([rpb.RouterFrame()], grpc.StatusCode.INVALID_ARGUMENT, "hello", id="no-hello"),
        pytest.param([], grpc.StatusCode.INVALID_ARGUMENT, "hello", id="nothing"),
        pytest.param(
            [rpb.RouterFrame(hello=rpb.Hello(router_id=""))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "router_id",
            id="no-name",
        ),
        pytest.param(
            [rpb.RouterFrame(hello=rpb.Hello(router_id="a", grace_ms=10**9))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "grace_ms",
            id="endless-grace",
        ),
        pytest.param(
            [rpb.RouterFrame(hello=rpb.Hello(router_id="a"))] * 2,
            grpc.StatusCode.INVALID_ARGUMENT,
            "hello",
            id="hello-twice",
        ),
    ],
)
def test_malformed_streams(frontend: EngineFrontend, frames: list[Any], code: grpc.StatusCode, told: str) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server:
            router = RouterStream(server.port)
            call = router.stub.Attach(iter(frames))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in call:
                    pass
            assert raised.value.code() is code
            assert told in (raised.value.details() or "")
            await router._channel.close()

    asyncio.run(run())


def test_a_stream_that_is_broken_off_during_its_first_frame_gets_its_status(
    frontend: EngineFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = ReplicaServicer.load

    def break_off_soon(servicer: ReplicaServicer) -> pb.ReplicaLoad:
        # Asked for the first frame; it is being written when the event loop comes to this.
        for session in servicer._roster.streams():
            asyncio.get_running_loop().call_soon(session.break_off, StatusError.unavailable("broken off"))
        return loads(servicer)

    monkeypatch.setattr(ReplicaServicer, "load", break_off_soon)

    async def run() -> None:
        async with replica_server(frontend) as server, asyncio.timeout(60.0):
            for _ in range(20):
                router = RouterStream(server.port)
                call = router.stub.Attach()
                await call.write(rpb.RouterFrame(hello=rpb.Hello(router_id="a")))
                with pytest.raises(grpc.aio.AioRpcError, match="broken off") as raised:
                    async for _ in call:
                        pass
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
                await router._channel.close()

    asyncio.run(run())


def test_a_stream_that_says_nothing_is_ended(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend, hello_timeout_s=0.1) as server:
            router = RouterStream(server.port)
            call = router.stub.Attach()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await router._channel.close()

    asyncio.run(run())
