"""Health, drain, stop, faults of the engine, and what a replica tells of its model."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jetflow_cluster import SamplingParams
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import HEALTH_SERVICE, ReplicaServer
from jetflow_cluster.cluster.replica.servicer import ReplicaServicer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.resolve import arithmetic
from jetflow_cluster.rpc.convert import sampling_to_proto
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH
from support.replica_client import RouterStream, replica_server

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
SHORT = dataclasses.replace(LONG, max_tokens=12)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def _health(port: int, service: str) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return answer.status


async def _becomes(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(120):
        while not await check():
            await asyncio.sleep(0.01)


def test_drain_finishes_what_runs(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            assert await _health(server.port, HEALTH_SERVICE) == SERVING
            router.submit("x", [1, 2], dataclasses.replace(LONG, max_tokens=150))
            await router.begun("x")
            draining = asyncio.create_task(server.drain(120.0))
            await router.wait(lambda: router.frames[-1].load.draining)
            router.submit("late", [1], SHORT)
            (late,) = await router.ended("late")
            assert late.refused.code == rpb.REFUSAL_CODE_DRAINING
            assert late.started is None
            (heard,) = await router.ended("x")
            assert len(heard.token_ids) == 150
            assert await draining is True
            assert server.load().outstanding_tokens == 0
            assert await _health(server.port, HEALTH_SERVICE) == NOT_SERVING
            assert await _health(server.port, "") == SERVING, "the process lives"

    asyncio.run(run())


def test_what_drain_does_not_wait_for_goes_elsewhere(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            router.submit("x", [1, 2], LONG)
            await router.begun("x")
            assert await server.drain(0.0) is False
            (heard,) = await router.ended("x")
            assert heard.finished is None
            assert heard.refused.code == rpb.REFUSAL_CODE_DRAINING
            assert not frontend.engine.requests

    asyncio.run(run())


def test_stop_leaves_nothing(frontend: EngineFrontend) -> None:
    async def run() -> set[str]:
        config = ReplicaServerConfig(host="127.0.0.1", stop_timeout_s=0.1)
        server = ReplicaServer(config, frontend)
        await server.stop()
        port = await server.start()
        assert port == server.port > 0
        async with RouterStream(port) as router:
            await router.stub.Encode(pb.TokenizeRequest(text="x"))
            router.submit("x", [1, 2], LONG)
            await router.begun("x")
            await server.stop()
            (heard,) = await router.ended("x")
            assert heard.refused.code == rpb.REFUSAL_CODE_DRAINING
            assert await router.closed() is grpc.StatusCode.OK
        await server.stop()
        with pytest.raises(RuntimeError, match="does not run"):
            await server.drain()
        return {task.get_coro().__qualname__ for task in asyncio.all_tasks() - {asyncio.current_task()}}

    left = asyncio.run(run())
    assert not [name for name in left if "Replica" in name or "Session" in name]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("jetflow")]


def test_a_port_that_is_taken(frontend: EngineFrontend) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server:
            other = ReplicaServer(ReplicaServerConfig(host="127.0.0.1", port=server.port), frontend)
            with pytest.raises(RuntimeError):
                await other.start()
            await other.stop()

    asyncio.run(run())


def test_a_failed_step_is_told_without_its_inside(frontend: EngineFrontend) -> None:
    target = frontend.engine.target
    verify = target.verify

    def fail_third(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("secret inside")
        return verify(*args)

    calls = 0
    target.verify = fail_third  # type: ignore[method-assign]

    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            router.submit("x", [1, 2], LONG)
            (heard,) = await router.ended("x")
            assert heard.started is not None and heard.finished is None
            assert heard.refused.code == rpb.REFUSAL_CODE_INTERNAL
            assert b"secret" not in b"".join(frame.SerializeToString() for frame in router.frames)
            # Text that is held back is told by the replica that goes on.
            assert all(delta.token_ids for delta in heard.deltas)
            router.submit("y", [1, 2], SHORT)
            (heard,) = await router.ended("y")
            assert heard.finished is not None

    try:
        asyncio.run(run())
    finally:
        target.verify = verify  # type: ignore[method-assign]


def test_a_lost_engine_shows(make_frontend: Any) -> None:
    frontend = make_frontend()

    def lose() -> Any:
        raise MemoryError("secret inside")

    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            router.submit("x", [1, 2], LONG)
            await router.begun("x")
            frontend.engine.scheduler.schedule = lose
            (heard,) = await router.ended("x")
            assert heard.refused.code == rpb.REFUSAL_CODE_INTERNAL
            await router.wait(lambda: router.frames[-1].HasField("load") and not router.frames[-1].load.healthy)
            router.submit("y", [1, 2], SHORT)
            (heard,) = await router.ended("y")
            assert heard.refused.code == rpb.REFUSAL_CODE_INTERNAL

            async def is_told() -> bool:
                return await _health(server.port, HEALTH_SERVICE) == NOT_SERVING

            await _becomes(is_told)
            assert isinstance(server.step_loop.failure, MemoryError)
            assert b"secret" not in b"".join(frame.SerializeToString() for frame in router.frames)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["started_to_proto", "events_of"])
def test_what_cannot_be_told_is_refused(frontend: EngineFrontend, monkeypatch: Any, caplog: Any, name: str) -> None:
    def fail(*args: Any) -> Any:
        raise KeyError("secret inside")

    async def run() -> None:
        async with replica_server(frontend) as server, RouterStream(server.port) as router:
            with monkeypatch.context() as patched:
                patched.setattr(f"jetflow_cluster.cluster.replica.servicer.{name}", fail)
                router.submit("x", [1, 2], LONG)
                (heard,) = await router.ended("x")
                assert heard.refused == rpb.Refused(request_id="x", code=rpb.REFUSAL_CODE_INTERNAL)
            router.submit("y", [1, 2], SHORT)
            (heard,) = await router.ended("y")
            assert heard.finished is not None

    asyncio.run(run())
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_stream_that_was_superseded_begins_nothing(frontend: EngineFrontend) -> None:
    submit = rpb.Submit(request_id="x", token_ids=[1, 2], sampling=sampling_to_proto(LONG))

    async def run() -> None:
        servicer = ReplicaServicer(ReplicaServerConfig(), frontend)
        servicer.start()
        first, second = (servicer._attach(rpb.Hello(router_id="a")) for _ in range(2))
        servicer._take(first, rpb.RouterFrame(submits=[submit]))
        assert not first.keys and not second.keys
        servicer._take(second, rpb.RouterFrame(submits=[submit]))
        assert len(second.keys) == 1
        await servicer.stop()

    asyncio.run(run())


def test_encode(frontend: EngineFrontend, fp64_target: Path) -> None:
    async def run() -> None:
        async with replica_server(frontend) as server:
            router = RouterStream(server.port)
            answer = await router.stub.Encode(pb.TokenizeRequest(text="héllo"))
            assert list(answer.token_ids) == frontend.encode("héllo")
            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
            for wrong in (pb.TokenizeRequest(), pb.TokenizeRequest(text=""), pb.TokenizeRequest(chat=chat)):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await router.stub.Encode(wrong)
                assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await router._channel.close()

    asyncio.run(run())


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat(frontend: EngineFrontend, fp64_target: Path) -> None:
    template = fp64_target / "chat_template.jinja"
    settings = fp64_target / "tokenizer_config.json"
    template.write_text(TEMPLATE)
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    frontend._chat_tokenizer = None

    async def run() -> None:
        async with replica_server(frontend) as server:
            router = RouterStream(server.port)
            assert (await router.stub.Describe(pb.GetModelCardRequest())).has_chat_template
            user = pb.ChatMessage(role="user", content="hi")
            answer = await router.stub.Encode(pb.TokenizeRequest(chat=pb.ChatMessages(messages=[user])))
            assert list(answer.token_ids) == frontend.encode("<user>hi<assistant>")
            tool = pb.ChatMessage(role="tool", content="hi")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await router.stub.Encode(pb.TokenizeRequest(chat=pb.ChatMessages(messages=[user, tool])))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "chat.messages" in (raised.value.details() or "")
            await router._channel.close()

    try:
        asyncio.run(run())
    finally:
        template.unlink()
        settings.unlink()
        frontend._chat_tokenizer = None


def test_describe(frontend: EngineFrontend, fp64_target: Path) -> None:
    async def run() -> None:
        async with replica_server(frontend, model_name="tiny", num_draft_workers=2) as server:
            router = RouterStream(server.port)
            card = await router.stub.Describe(pb.GetModelCardRequest(model="tiny"))
            assert card.version
            assert card.arithmetic == str(arithmetic(frontend.config)) and card.arithmetic.startswith("float64, ")
            card.version = card.arithmetic = ""
            assert card == pb.ModelCard(
                model="tiny",
                architecture="Qwen3ForCausalLM",
                vocab_size=288,
                max_model_len=512,
                dtype="float64",
                eos_token_ids=[256],
                tensor_parallel_size=1,
                num_draft_workers=2,
                has_draft_head=True,
                max_tree_nodes=512,
                max_depth=MAX_LOOKUP_DEPTH,
            )
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await router.stub.Describe(pb.GetModelCardRequest(model="other"))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
            await router._channel.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "field, value",
    [
        ("replica_id", ""),
        ("replica_id", "ü"),
        ("model_name", "a" * 300),
        ("host", ""),
        ("port", 70_000),
        ("num_draft_workers", -1),
        ("heartbeat_s", 0.0),
        ("stall_timeout_s", -1.0),
        ("hello_timeout_s", 0.0),
        ("max_pending_events", 0),
        ("max_frame_bytes", 10),
        ("max_frame_bytes", 2**30),
        ("max_failed_steps", 0),
        ("num_trace_slots", 0),
        ("drain_timeout_s", -1.0),
        ("stop_timeout_s", -1.0),
        ("max_step_s", 0.0),
        ("max_grace_s", -1.0),
    ],
)
def test_wrong_configurations_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*: must"):
        ReplicaServerConfig(**{field: value})
