"""A small server of the API in a thread of its own, with faults on demand. Its tokens are a function of prompt, seed
and position, so any call that resumes another must give the same."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from jetflow_cluster.rpc.client import SERVICE
from jetflow_cluster.rpc.convert import check_request, delta_to_proto, finished_to_proto, started_to_proto
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.interceptor import ErrorInterceptor
from jetflow_cluster.rpc.options import SERVER_OPTIONS
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.types import (
    FinishReason,
    RequestDelta,
    RequestOutput,
    SamplingParams,
    SpeculationStats,
    TokenLogprobs,
    Usage,
)

#: Turns the events of a call into those that are sent.
Fault = Callable[[AsyncIterator[pb.GenerateEvent]], AsyncGenerator[pb.GenerateEvent, None]]
#: Makes the deltas of one request.
Engine = Callable[[str | list[int], SamplingParams, str], AsyncIterator[RequestDelta]]


def refuse(error: Exception) -> Fault:
    """Fails before anything was told."""

    async def fault(events: AsyncIterator[pb.GenerateEvent]) -> AsyncGenerator[pb.GenerateEvent, None]:
        raise error
        yield

    return fault


def fail_after(num_events: int, error: Exception | None = None) -> Fault:
    """Ends behind so many events; without an error as if all were well."""

    async def fault(events: AsyncIterator[pb.GenerateEvent]) -> AsyncGenerator[pb.GenerateEvent, None]:
        left = num_events
        async for event in events:
            if left == 0:
                break
            left -= 1
            yield event
        if error is not None:
            raise error

    return fault


def hang_after(num_events: int) -> Fault:
    """Says nothing more behind so many events, until the call is cancelled."""

    async def fault(events: AsyncIterator[pb.GenerateEvent]) -> AsyncGenerator[pb.GenerateEvent, None]:
        left = num_events
        async for event in events:
            if left == 0:
                await asyncio.Event().wait()
            left -= 1
            yield event

    return fault


def rewrite(index: int, change: Callable[[pb.GenerateEvent], Iterable[pb.GenerateEvent]]) -> Fault:
    """Sends others in place of one event."""

    async def fault(events: AsyncIterator[pb.GenerateEvent]) -> AsyncGenerator[pb.GenerateEvent, None]:
        here = itertools.count()
        async for event in events:
            for changed in change(event) if next(here) == index else [event]:
                yield changed

    return fault


def toy_tokens(prompt: str | list[int], seed: int, count: int) -> list[int]:
    """The output of the server's toy model."""
    return [
        int.from_bytes(hashlib.sha256(f"{prompt}/{seed}/{position}".encode()).digest()[:2], "little") % 1000
        for position in range(count)
    ]


def toy_text(token_ids: Iterable[int]) -> str:
    """What the tokens of the toy model say."""
    return "".join(f"{token:03d} " for token in token_ids)


async def toy_engine(prompt: str | list[int], params: SamplingParams, request_id: str) -> AsyncIterator[RequestDelta]:
    """One, two and three tokens by turns; the text is a token behind, as if each could begin a stop string."""
    tokens = toy_tokens(prompt, params.seed or 0, params.max_tokens)
    start = len(params.prior_output_token_ids)
    assert list(params.prior_output_token_ids) == tokens[:start]
    for step in itertools.count(1):
        end = min(start + (step - 1) % 3 + 1, len(tokens))
        is_last = end == len(tokens)
        yield RequestDelta(
            request_id=request_id,
            offset=start,
            token_ids=tokens[start:end],
            text=toy_text(tokens[max(0, start - 1) : end if is_last else end - 1]),
            logprobs=[TokenLogprobs(token_id=t, logprob=-t / 8) for t in tokens[start:end]]
            if params.logprobs is not None
            else None,
            num_accepted=end - start - 1,
            finish_reason=FinishReason.LENGTH if is_last else None,
        )
        start = end
        if is_last:
            return


class ApiServicer(inference_pb2_grpc.JetFlowInferenceServicer):
    """The service; `faults` are those of the next calls, in order, and `requests` what was asked."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.faults: list[Fault | None] = []
        #: Errors of the next unary calls.
        self.refusals: list[Exception] = []
        self.requests: list[pb.GenerateRequest] = []
        self.num_ended = 0

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        self.requests.append(request)
        fault = self.faults.pop(0) if self.faults else None
        events = self._events(request)
        try:
            async with aclosing(events), aclosing(fault(events) if fault is not None else events) as sent:
                async for event in sent:
                    yield event
        finally:
            self.num_ended += 1

    async def _events(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateEvent, None]:
        params = check_request(request)
        seed = params.seed if params.seed is not None else 1234
        prompt: Any = request.text or list(request.token_ids.ids) or request.chat.messages[0].content
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        name = request.request_id or f"server-{len(self.requests)}"
        started = started_to_proto(
            request_id=name,
            replica_id="replica-0",
            model="toy",
            seed=seed,
            prompt_token_ids=ids,
            echo_prompt=isinstance(prompt, str),
        )
        yield pb.GenerateEvent(started=started)
        fields = {name: getattr(params, name) for name in params.__dataclass_fields__} | {"seed": seed}
        output = RequestOutput(request_id=name, prompt_token_ids=ids, token_ids=[], text="", finish_reason=None)
        count = len(params.prior_output_token_ids)
        async for delta in self.engine(prompt, SamplingParams(**fields), name):
            output.finish_reason = delta.finish_reason
            count = delta.offset + len(delta.token_ids)
            if delta.token_ids:
                yield pb.GenerateEvent(delta=delta_to_proto(delta))
        output.usage = Usage(prompt_tokens=len(ids), completion_tokens=count, cached_tokens=2)
        output.speculation = SpeculationStats(num_steps=1, num_draft_nodes=3, num_accepted_tokens=0)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *(TokenLogprobs(token_id=i, logprob=-1.0) for i in ids[1:])]
        yield pb.GenerateEvent(finished=finished_to_proto(output, pb.Timing(total_s=1.5)))

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    async def AbortRequest(self, request: pb.AbortRequestRequest, context: Any) -> pb.AbortRequestResponse:
        self._refuse()
        known = [name for name in request.request_ids if name.startswith("known")]
        return pb.AbortRequestResponse(aborted_ids=known, unknown_ids=set(request.request_ids) - set(known))

    async def GetModelCard(self, request: pb.GetModelCardRequest, context: Any) -> pb.ModelCard:
        self._refuse()
        if request.model not in ("", "toy"):
            raise StatusError.not_found(f"model {request.model!r} is not served")
        return pb.ModelCard(model="toy", vocab_size=1000)

    async def GetServerLoad(self, request: pb.GetServerLoadRequest, context: Any) -> pb.ServerLoad:
        self._refuse()
        return pb.ServerLoad(router_id="router-0", replicas=[pb.ReplicaLoad(replica_id="replica-0", healthy=True)])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._refuse()
        text = request.text or "".join(message.content for message in request.chat.messages)
        return pb.TokenizeResponse(token_ids=text.encode())

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._refuse()
        return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))


class ApiServer:
    """A running `ApiServicer`."""

    def __init__(self, engine: Engine = toy_engine, *, port: int = 0):
        self.servicer = ApiServicer(engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server, self.address = self.run(self._start(port))

    async def _start(self, port: int) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
        inference_pb2_grpc.add_JetFlowInferenceServicer_to_server(self.servicer, server)
        checker = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        await checker.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._health = checker
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        return server, f"127.0.0.1:{bound}"

    def run(self, coroutine: Any) -> Any:
        """Runs something in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def drain(self) -> None:
        """Says that nothing can be served."""
        self.run(self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING))

    def stop(self) -> None:
        """Ends all calls at once."""
        if not self._loop.is_closed():
            self.run(self._server.stop(None))
            self.run(self._loop.shutdown_asyncgens())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(60)
            self._loop.close()


@contextmanager
def api_server(engine: Engine = toy_engine) -> Iterator[ApiServer]:
    """A server that is stopped at the end."""
    server = ApiServer(engine)
    try:
        yield server
    finally:
        server.stop()
