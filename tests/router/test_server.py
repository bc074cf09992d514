"""The server around the service: health, reflection, draining, configuration."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.request_ids import RequestIds, owner_of
from jetflow_cluster.router.server import SERVICE, RouterServer
from jetflow_cluster.rpc.client import SERVICE as CLIENTS_SERVICE
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.types import SamplingParams
from support.toy_cluster import PROMPT, Cluster, cluster, failure, request, run, stream, until
from support.toy_replica import expected

KINDS = health_pb2.HealthCheckResponse


async def check(made: Cluster, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(made.routers[0].channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_follows_the_replicas(service: str) -> None:
    async def test() -> None:
        async with cluster(1, max_probe_pause_s=0.2) as made:
            stub: Any = health_pb2_grpc.HealthStub(made.routers[0].channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest(service=service)) for _ in range(3)]

            async def told(status: int) -> None:
                assert [(await watch.read()).status for watch in watches] == [status] * len(watches)
                assert await check(made, service) == status

            await told(KINDS.SERVING)
            made.replicas[0].healthy = False
            await told(KINDS.NOT_SERVING)
            # One watcher that leaves takes nothing from the others.
            watches.pop().cancel()
            made.replicas[0].healthy = True
            await told(KINDS.SERVING)
            made.replicas[0].draining = True
            await told(KINDS.NOT_SERVING)
            made.replicas[0].draining = False
            await told(KINDS.SERVING)
            await made.replicas[0].stop()
            await told(KINDS.NOT_SERVING)
            await made.replicas[0].start()
            await told(KINDS.SERVING)
            assert await made.routers[0].server.drain(10)
            await told(KINDS.NOT_SERVING)
            await made.routers[0].server.stop()
            assert [await watch.read() for watch in watches] == [grpc.aio.EOF] * len(watches)

    run(test)


def test_health_of_unknown_services() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            stub: Any = health_pb2_grpc.HealthStub(made.routers[0].channel)
            question = health_pb2.HealthCheckRequest(service="other")
            assert (await failure(stub.Check(question))).code is grpc.StatusCode.NOT_FOUND
            watch = stub.Watch(question)
            assert (await watch.read()).status == KINDS.SERVICE_UNKNOWN
            watch.cancel()

    run(test)


def test_reflection_describes_the_service() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(made.routers[0].channel)
            questions = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            ]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(questions))]
            assert SERVICE in {service.name for service in answers[0].list_services_response.service}
            file = descriptor_pb2.FileDescriptorProto.FromString(
                answers[1].file_descriptor_response.file_descriptor_proto[0]
            )
            assert file.package == "jetflow.inference.v1"
            assert SERVICE == CLIENTS_SERVICE

    run(test)


def test_a_draining_router_ends_what_runs_and_takes_nothing_new() -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.01}) as made:
            server = made.routers[0].server
            runs = [asyncio.create_task(stream(made.stub, request(90, seed=seed))) for seed in range(3)]
            await until(lambda: len(made.running) == 3)
            assert not await server.drain(0.01)
            error = await failure(stream(made.stub, request()))
            assert error.code is grpc.StatusCode.UNAVAILABLE and error.retry_after_s is not None
            assert await server.drain()
            for seed, task in enumerate(runs):
                (await task).check(request(90, seed=seed))

    run(test)


def test_a_stopped_router_leaves_nothing_on_its_replicas() -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.01}, max_replica_tokens=3000) as made:
            runs = [asyncio.create_task(failure(stream(made.stub, request(900, seed=seed)))) for seed in range(3)]
            await until(lambda: len(made.running) == 3)
            runs.append(asyncio.create_task(failure(made.stub.GenerateOnce(request(9000)))))
            await until(lambda: made.routers[0].server.load().num_queued == 1)
            await made.routers[0].server.stop()
            await made.routers[0].server.stop()
            assert {(await task).code for task in runs} == {grpc.StatusCode.UNAVAILABLE}
            await until(lambda: not made.running)

    run(test)


def test_a_taken_port_is_an_error() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            second = RouterServer(RouterConfig(host="127.0.0.1", port=made.routers[0].server.port))
            with pytest.raises(RuntimeError):
                await second.start()
            await second.stop()

    run(test)


def test_the_client_goes_on_when_its_router_stops() -> None:
    async def test() -> None:
        async with cluster(2, 2, replica={"step_s": 0.01}) as made:
            addresses = [router.address for router in made.routers]
            async with AsyncJetFlowClient(addresses, timeout_s=60) as client:
                params = SamplingParams(max_tokens=300, seed=7)
                found = client.stream(PROMPT, params)
                stopped = False
                async for _ in found:
                    if not stopped and len(found.output.token_ids) > 10:
                        await next(router for router in made.routers if router.server.num_running).server.stop()
                        stopped = True
                whole = expected(PROMPT, 7, 300)
                assert (found.output.token_ids, found.output.text) == (whole.token_ids, whole.text)
                assert found.num_calls == 2
            await until(lambda: not made.running)

    run(test)


@pytest.mark.parametrize(
    "options, problem",
    [
        pytest.param({"router_id": "a:b"}, "router_id = 'a:b'", id="router-id"),
        pytest.param({"port": 70_000}, "port = 70000", id="port"),
        pytest.param({"host": ""}, "host = ''", id="host"),
        pytest.param({"max_queued_tokens": 0}, "max_queued_tokens = 0", id="count"),
        pytest.param({"silence_s": 0.0}, "silence_s = 0.0", id="positive"),
        pytest.param({"resume_timeout_s": -1.0}, "resume_timeout_s = -1.0", id="not-negative"),
        pytest.param({"max_probe_pause_s": 0.01}, "max_probe_pause_s = 0.01", id="pauses"),
        pytest.param({"max_connection_age_s": 0.0}, "max_connection_age_s = 0.0", id="age"),
        pytest.param({"load_bound_tokens": -1}, "load_bound_tokens = -1", id="bound"),
    ],
)
def test_config_names_field_value_and_limit(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match="must") as info:
        RouterConfig(**options)
    assert str(info.value).startswith(problem)


def test_a_router_loads_neither_torch_nor_ray() -> None:
    code = "import sys, jetflow_cluster.router.server; print(*{'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == []


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_missing_tokenizer_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        RouterServer(RouterConfig(tokenizer=str(tmp_path)))


def test_request_ids_name_router_and_replica_and_never_come_twice() -> None:
    first, second = RequestIds("router-0"), RequestIds("router-0")
    names = [ids.new("replica-3") for ids in (first, second) for _ in range(100)]
    assert len(set(names)) == 200
    assert {owner_of(name) for name in names} == {"router-0"}
    assert [owner_of(name) for name in ("mine", "a:b", "a:b:c:d", "::", "")] == [None] * 5
