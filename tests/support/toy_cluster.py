"""Routers and toy replicas in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.errors import StatusError, error_from_rpc
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from support.toy_replica import Expected, ToyReplica, expected

PROMPT = [3, 1, 4, 1, 5]
#: Patient, so that a busy machine is not taken for a fault; tests of a limit set it.
PATIENT: dict[str, Any] = {"silence_s": 20.0, "connect_timeout_s": 30.0, "unavailable_after_s": 30.0}


def run(test: Callable[[], Awaitable[None]], limit_s: float = 120.0) -> None:
    """Runs a test in a loop of its own."""

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await test()

    asyncio.run(limited())


async def until(holds: Callable[[], Any], limit_s: float = 60.0) -> float:
    """Waits for a condition; returns the seconds that it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, "it did not come to pass"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


@dataclass
class Router:
    """A running router, and stubs to it."""

    server: RouterServer
    channel: grpc.aio.Channel
    stub: Any

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@dataclass
class Cluster:
    """Replicas that all routers know, and routers that know each other."""

    replicas: list[ToyReplica]
    routers: list[Router] = field(default_factory=list)

    @property
    def stub(self) -> Any:
        return self.routers[0].stub

    @property
    def running(self) -> list[str]:
        """Ids of requests that run on any replica."""
        return [name for replica in self.replicas for name in replica.running]

    @property
    def num_submits(self) -> int:
        """Requests that reached a replica."""
        return sum(len(replica.submits) for replica in self.replicas)

    def tell(self, replicas: list[ToyReplica] | None = None) -> None:
        """Makes these the replicas of all routers."""
        known = self.replicas if replicas is None else replicas
        for router in self.routers:
            router.server.set_replicas({replica.replica_id: replica.address for replica in known})

    async def is_up(self, count: int | None = None) -> None:
        """Waits until so many replicas can be used by every router."""
        wanted = len(self.replicas) if count is None else count
        for router in self.routers:
            await until(lambda r=router: sum(x.healthy and not x.draining for x in r.server.load().replicas) == wanted)

    async def is_clean(self) -> None:
        """Waits until nothing is left of any request."""
        await until(lambda: not self.running and not any(router.server.num_running for router in self.routers))
        for router in self.routers:
            assert all(not load.outstanding_tokens for load in router.server.load().replicas)


@asynccontextmanager
async def cluster(
    num_replicas: int = 2,
    num_routers: int = 1,
    *,
    replica: dict[str, Any] | None = None,
    arithmetics: Sequence[str] = (),
    **config: Any,
) -> AsyncIterator[Cluster]:
    """A cluster that is up. `arithmetics` are what the cards of the first replicas say."""
    replicas = [await ToyReplica(f"replica-{i}", **(replica or {})).start() for i in range(num_replicas)]
    for each, arithmetic in zip(replicas, arithmetics, strict=False):
        each.arithmetic = arithmetic
    made = Cluster(replicas)
    try:
        for index in range(num_routers):
            options = {"router_id": f"router-{index}", "host": "127.0.0.1", "port": 0} | PATIENT | config
            server = RouterServer(RouterConfig(**options))
            await server.start()
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
            made.routers.append(Router(server, channel, inference_pb2_grpc.JetFlowInferenceStub(channel)))
        peers = {router.server.config.router_id: router.address for router in made.routers}
        for router in made.routers:
            router.server.set_peers(peers)
        made.tell()
        await made.is_up()
        yield made
    finally:
        for router in made.routers:
            await router.channel.close()
            await router.server.stop()
        for each in replicas:
            await each.stop()


def request(max_tokens: int = 24, seed: int | None = 7, **options: Any) -> pb.GenerateRequest:
    """A request; options of the sampling parameters, or of the request itself."""
    outer = {
        key: options.pop(key)
        for key in ("request_id", "session_id", "model", "timeout_ms", "arithmetic")
        if key in options
    }
    sampling = pb.SamplingParams(max_tokens=max_tokens, seed=seed, **options)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling, **outer)


@dataclass
class Seen:
    """What a client saw of a stream."""

    started: pb.Started | None = None
    deltas: list[pb.Delta] = field(default_factory=list)
    finished: pb.Finished | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def take(self, event: pb.GenerateEvent) -> None:
        """Takes the next event, which must fit what came before."""
        kind = event.WhichOneof("event")
        assert self.finished is None
        assert (self.started is None) == (kind == "started")
        if kind == "delta":
            self.deltas.append(event.delta)
        elif kind is not None:
            setattr(self, kind, getattr(event, kind))

    def check(self, message: pb.GenerateRequest, prompt: list[int] | None = None) -> Expected:
        """Asserts that the stream is the whole request's; returns what that is."""
        sampling = message.sampling
        prior = list(sampling.prior_output_token_ids)
        assert self.started is not None and self.finished is not None
        seed = self.started.seed
        assert not sampling.HasField("seed") or seed == sampling.seed
        given = PROMPT if prompt is None else prompt
        whole = expected(given, seed, sampling.max_tokens, sampling.stop)
        offset = len(prior)
        for delta in self.deltas:
            assert delta.seq_offset == offset
            offset += len(delta.token_ids)
            if sampling.HasField("logprobs"):
                assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
        assert prior + self.token_ids == whole.token_ids
        assert whole.text.endswith(self.text) and (prior or self.text == whole.text)
        assert self.finished.finish_reason == whole.finish_reason
        assert self.finished.matched_stop_string == whole.stop
        assert self.finished.usage.completion_tokens == len(whole.token_ids)
        stats = self.finished.speculation
        assert sum(stats.acceptance_histogram) == stats.num_spec_steps
        assert sum(i * n for i, n in enumerate(stats.acceptance_histogram)) == stats.num_accepted_draft_tokens
        return whole


async def stream(stub: Any, message: pb.GenerateRequest, **options: Any) -> Seen:
    """The whole stream of a request; raises `StatusError` or `InvalidFieldsError`."""
    seen = Seen()
    try:
        async for event in stub.GenerateStream(message, **options):
            seen.take(event)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from None
    return seen


async def failure(call: Awaitable[Any]) -> StatusError:
    """The status that a call ends with."""
    try:
        await call
    except StatusError as error:
        return error
    except grpc.RpcError as error:
        found = error_from_rpc(error)
        assert isinstance(found, StatusError), found
        return found
    raise AssertionError("the call did not fail")
