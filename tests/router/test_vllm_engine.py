"""The adapter for gateways: raw stubs of the published package, before a real engine."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import grpc
import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.options import CHANNEL_OPTIONS
from support.router_stack import stack
from support.toy_cluster import cluster, failure, run, until

pytest.importorskip("smg_grpc_proto")
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

PROMPT = [40, 41, 42, 43]


def request(**sampling: Any) -> Any:
    stream = sampling.pop("stream", False)
    return vllm.GenerateRequest(
        request_id=sampling.pop("request_id", ""),
        tokenized={"input_ids": PROMPT},
        sampling_params={"max_tokens": 24, "ignore_eos": True} | sampling,
        stream=stream,
    )


def test_tokens_are_those_of_the_engine(local: LLM, frontends: list[EngineFrontend], target: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.5, seed=3, ignore_eos=True, logprobs=2)
    wanted = local.generate([PROMPT], params)[0]

    async def test() -> None:
        async with stack(frontends, target, gateway_port=0) as made:
            address = f"127.0.0.1:{made.router.gateway_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                sampling = {"temperature": 0.5, "seed": 3, "logprobs": 2}
                (whole,) = [each async for each in stub.Generate(request(**sampling))]
                assert list(whole.complete.output_ids) == wanted.token_ids
                assert (whole.complete.finish_reason, whole.complete.prompt_tokens) == ("length", len(PROMPT))
                assert wanted.logprobs is not None
                expected = [entry.logprob for entry in wanted.logprobs]
                assert list(whole.complete.output_logprobs.token_logprobs) == pytest.approx(expected, rel=1e-4)
                told = [each async for each in stub.Generate(request(stream=True, **sampling))]
                assert [token for each in told[:-1] for token in each.chunk.token_ids] == wanted.token_ids
                assert [each.chunk.completion_tokens for each in told[:-1]][-1] == 24
                complete = told[-1].complete
                assert 0 < complete.spec_draft_tokens >= complete.spec_accepted_tokens
                info = await stub.GetModelInfo(vllm.GetModelInfoRequest())
                assert (info.served_model_name, info.max_context_length) == (target.name, 512)
                assert (await stub.GetServerInfo(vllm.GetServerInfoRequest())).server_type == "vllm-grpc"
                assert (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
                ranks = [load.dp_rank for load in (await stub.GetLoads(vllm.GetLoadsRequest())).loads]
                assert ranks == list(range(len(frontends)))
                (one,) = (await stub.GetLoads(vllm.GetLoadsRequest(dp_rank=1))).loads
                assert one.dp_rank == 1
                embed = await failure(stub.Embed(vllm.EmbedRequest()))
                assert embed.code is grpc.StatusCode.UNIMPLEMENTED
            await made.is_idle()

    run(test, 240)


BAD: dict[str, dict[str, Any]] = {
    "n": {"n": 2},
    "json_object": {"json_object": True},
    "seed": {"seed": -1},
    "logprobs": {"logprobs": -1},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 3},
    "temperature": {"temperature": -1.0},
}


@pytest.mark.parametrize("field, sampling", BAD.items(), ids=BAD)
def test_what_cannot_be_honoured_is_named(field: str, sampling: dict[str, Any]) -> None:
    async def test() -> None:
        async with (
            cluster(1, gateway_port=0) as made,
            grpc.aio.insecure_channel(f"127.0.0.1:{made.routers[0].server.gateway_port}") as channel,
        ):
            stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(request(**sampling)).read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in refused.value.details()

    run(test)


def test_abort_ends_a_request() -> None:
    async def test() -> None:
        async with (
            cluster(1, gateway_port=0, replica={"step_s": 0.02}) as made,
            grpc.aio.insecure_channel(f"127.0.0.1:{made.routers[0].server.gateway_port}") as channel,
        ):
            stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            call = stub.Generate(request(max_tokens=900, request_id="mine", stream=True))
            await until(lambda: len(made.running) == 1)
            await stub.Abort(vllm.AbortRequest(request_ids=["mine"]))
            told = [each async for each in call]
            assert told[-1].complete.finish_reason == "abort"
            await made.is_clean()

    run(test)


def test_the_port_goes_to_the_next_router() -> None:
    async def test() -> None:
        async with cluster(1, gateway_port=0, share_ports=True, replica={"step_s": 0.005}) as made:
            first = made.routers[0].server
            port = first.gateway_port
            second = RouterServer(dataclasses.replace(first.config, router_id="router-1", gateway_port=port))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                running = asyncio.create_task(stub.Generate(request(max_tokens=600)).read())
                await until(lambda: len(made.running) == 1)
                await second.start()
                second.set_replicas({made.replicas[0].replica_id: made.replicas[0].address})
                await until(lambda: second.is_serving)
                leaving = asyncio.create_task(first.hand_over(60))
                # A call of a bare stub that crosses the server's goodbye may be cancelled.
                await asyncio.sleep(0.5)
                for _ in range(20):
                    assert len((await stub.Generate(request()).read()).complete.output_ids) == 24
                assert len((await running).complete.output_ids) == 600
                assert await leaving
                # Request ids tell the router that gave them.
                assert "router-1" in made.replicas[0].submits[-1].request_id
                await second.stop()

    run(test)
