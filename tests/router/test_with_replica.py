"""A router before real replicas of a tiny model: the tokens and text are those of the engine, whatever breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, EngineConfig, SamplingParams
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import ReplicaServer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.types import FinishReason, RequestOutput, SpeculationOptions
from support.small_models import write_head, write_target
from support.toy_cluster import PATIENT, run, until

OPTIONS: dict[str, Any] = {"dtype": "float64", "device": "cpu", "num_pages": 96, "page_size": 8, "max_num_requests": 16}
PROMPT = "for i in range(3):"


class Wire:
    """A connection that can be cut, between a router and a replica."""

    def __init__(self, port: int):
        self.address = ""
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Ends what is connected; new connections can be made."""
        for writer in list(self._writers):
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


@dataclass
class Stack:
    """Replicas, the wires to them, and a router."""

    frontends: list[EngineFrontend]
    replicas: list[ReplicaServer]
    wires: list[Wire]
    router: RouterServer
    client: AsyncJetFlowClient

    async def is_idle(self) -> None:
        """Waits until no replica runs anything, and checks that no page is held."""
        await until(lambda: all(not frontend.engine.has_work for frontend in self.frontends))
        for frontend in self.frontends:
            stats = frontend.engine.stats()
            assert (stats.num_used_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"), max_len=512)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return write_head(tmp_path_factory.mktemp("head"), target)


@pytest.fixture(scope="module")
def local(target: Path, head: Path) -> LLM:
    return LLM(str(target), str(head), tree_nodes={1: 8}, **OPTIONS)


@pytest.fixture(scope="module")
def frontends(target: Path, head: Path) -> list[EngineFrontend]:
    config = EngineConfig(model=str(target), draft_head=str(head), **OPTIONS)
    return [EngineFrontend(config, tree_nodes={1: 8}) for _ in range(2)]


@asynccontextmanager
async def stack(frontends: list[EngineFrontend], target: Path) -> AsyncIterator[Stack]:
    replicas, wires = [], []
    config = RouterConfig(host="127.0.0.1", port=0, tokenizer=str(target), **PATIENT)
    router = RouterServer(config)
    await router.start()
    client = AsyncJetFlowClient(f"127.0.0.1:{router.port}", timeout_s=100)
    try:
        for index, frontend in enumerate(frontends):
            replica = ReplicaServer(ReplicaServerConfig(replica_id=f"replica-{index}", host="127.0.0.1"), frontend)
            replicas.append(replica)
            wires.append(Wire(await replica.start()))
            await wires[-1].start()
        router.set_replicas({f"replica-{index}": wire.address for index, wire in enumerate(wires)})
        await until(lambda: sum(load.healthy for load in router.load().replicas) == len(frontends))
        yield Stack(frontends, replicas, wires, router, client)
    finally:
        await client.close()
        await router.stop()
        for wire in wires:
            await wire.stop()
        for replica in replicas:
            await replica.stop()


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5},
    "logprobs": {"temperature": 1.0, "seed": 12, "logprobs": 2},
    "off": {"temperature": 1.0, "seed": 13, "speculation": SpeculationOptions(mode="off")},
}


def check(found: RequestOutput, wanted: RequestOutput) -> None:
    """The served output is the engine's."""
    assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
    assert (found.finish_reason, found.matched_stop) == (wanted.finish_reason, wanted.matched_stop)
    assert found.usage.completion_tokens == wanted.usage.completion_tokens
    if wanted.logprobs is not None:
        assert found.logprobs is not None
        assert [entry.token_id for entry in found.logprobs] == [entry.token_id for entry in wanted.logprobs]


def test_streams_are_those_of_the_engine_over_cut_wires(
    local: LLM, frontends: list[EngineFrontend], target: Path
) -> None:
    params = [SamplingParams(max_tokens=60, ignore_eos=True, **sampling) for sampling in SAMPLING.values()]
    wanted = local.generate([PROMPT] * len(params), params)
    stop = wanted[0].text[20:23]
    params.append(SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0, stop=[stop]))
    wanted += local.generate([PROMPT], params[-1:])

    async def test() -> None:
        async with stack(frontends, target) as made:
            resumes = 0

            async def one(index: int) -> None:
                nonlocal resumes
                stream = made.client.stream(PROMPT, params[index])
                num_deltas = 0
                async for _ in stream:
                    num_deltas += 1
                    if num_deltas in (2, 5) and stream.started is not None:
                        made.wires[num_deltas % 2].cut()
                check(stream.output, wanted[index])
                assert stream.num_calls == 1, "the client noticed nothing"
                assert stream.finished is not None
                resumes += stream.finished.num_resumes

            for index in range(len(params)):
                await one(index)
            await asyncio.gather(*(one(index) for index in range(len(params))))
            assert resumes > 0
            await made.is_idle()

    run(test, 240)


def test_a_replica_that_stops_hands_its_requests_over(
    local: LLM, frontends: list[EngineFrontend], target: Path
) -> None:
    params = SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, seed=5)
    wanted = local.generate([PROMPT], params)[0]

    async def test() -> None:
        async with stack(frontends, target) as made:
            stream = made.client.stream(PROMPT, params)
            async for _ in stream:
                if stream.started is not None and len(stream.output.token_ids) > 10:
                    await made.replicas[int(stream.started.replica_id[-1])].stop()
            check(stream.output, wanted)
            assert stream.num_calls == 1
            assert stream.finished is not None and stream.finished.num_resumes == 1
            await made.is_idle()

    run(test, 240)


def test_cancelled_and_aborted_requests_free_their_pages(frontends: list[EngineFrontend], target: Path) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)

    async def test() -> None:
        async with stack(frontends, target) as made:
            for index in range(12):
                async with made.client.stream(PROMPT, params) as stream:
                    await anext(stream)
                    if index % 2:
                        assert await made.client.abort(stream.request_id) == (stream.request_id,)
                    else:
                        stream.cancel()
                    async for _ in stream:
                        pass
                assert stream.output.finish_reason is FinishReason.ABORT
            await made.is_idle()

    run(test, 240)
