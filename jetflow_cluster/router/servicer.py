"""The methods of `JetFlowInference`, as a router answers them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from jetflow_cluster.router.delivery import Delivery
from jetflow_cluster.router.dispatcher import Dispatcher
from jetflow_cluster.router.gate import charge
from jetflow_cluster.router.peers import FORWARDED, Peers
from jetflow_cluster.router.routed_request import RoutedRequest
from jetflow_cluster.router.text import TextCodec
from jetflow_cluster.router.watch import Emit
from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.convert import check_request
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.tracing import trace_headers
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.types import InvalidRequestError

_SEED_BITS = 63
_STALL_RETRY_S = 1.0
#: A request of more bytes is checked in a thread.
_LARGE_BYTES = 65_536


class InferenceServicer(inference_pb2_grpc.JetFlowInferenceServicer):
    """The public service. Errors are raised as exceptions, for `rpc.interceptor.ErrorInterceptor` to tell.

    Args:
        dispatcher: of the router.
        peers: the other routers.
        codec: the model's tokenizer; None leaves text to the replicas.
    """

    def __init__(self, dispatcher: Dispatcher, peers: Peers, codec: TextCodec | None):
        self._dispatcher, self._peers, self._codec = dispatcher, peers, codec
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        #: True when new requests are refused.
        self.is_draining = False

    @property
    def num_running(self) -> int:
        """Requests that are being served or wait."""
        return self._num_running

    async def wait_idle(self) -> None:
        """Returns when no request is left."""
        await self._idle.wait()

    # A coroutine that writes, and no generator: cancellation ends it wherever it is, and not when it is collected.
    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        """One request; `Started`, deltas, `Finished`."""
        await self.generate(request, context.write, **_about(context))

    async def generate(
        self,
        request: pb.GenerateRequest,
        emit: Emit,
        *,
        time_left_s: float | None = None,
        headers: Iterable[tuple[str, str | bytes]] = (),
    ) -> None:
        """One request, whatever protocol it came by. Cancelling this ends it on its replica.

        Args:
            request: not checked yet.
            emit: takes `Started`, deltas, `Finished`; while it waits, nothing further is emitted.
            time_left_s: of the call; None is no limit.
            headers: of the call, names in lower case; they may tell of the caller's trace.

        Raises:
            StatusError: as documented for the API.
            InvalidRequestError: the request cannot be honoured.
        """
        with self._counted():
            routed = await self._make(request, time_left_s, headers)
            await routed.run(self._metered(emit))

    def _metered(self, emit: Emit) -> Emit:
        """Counts tokens for the caller, and ends a request whose client takes nothing."""
        count, stall_s = charge(), self._dispatcher.config.client_stall_s

        async def metered(event: pb.GenerateEvent) -> None:
            if event.HasField("delta"):
                count(len(event.delta.token_ids))
            elif event.HasField("started"):
                count(event.started.prompt_tokens)
            try:
                async with asyncio.timeout(stall_s):
                    await emit(event)
            except TimeoutError:
                message = f"the client took nothing for {stall_s:g} s"
                raise StatusError.resource_exhausted(message, _STALL_RETRY_S) from None

        return metered

    async def GenerateOnce(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResult:
        """One request, answered when it is finished."""
        if request.sampling.speculation.include_trees:
            limit = "only GenerateStream tells trees"
            raise InvalidRequestError("sampling.speculation.include_trees", True, limit)
        result = pb.GenerateResult()
        text: list[str] = []

        async def collect(event: pb.GenerateEvent) -> None:
            kind = event.WhichOneof("event")
            if kind == "delta":
                result.token_ids.extend(event.delta.token_ids)
                result.logprobs.extend(event.delta.logprobs)
                text.append(event.delta.text)
            elif kind is not None:
                getattr(result, kind).CopyFrom(getattr(event, kind))

        await self.generate(request, collect, **_about(context))
        result.text = "".join(text)
        return result

    async def AbortRequest(self, request: pb.AbortRequestRequest, context: Any) -> pb.AbortRequestResponse:
        """Ends requests, whichever router they came through."""
        checks.check_abort(request)
        names = list(dict.fromkeys(request.request_ids))
        aborted = {name for name in names if self._dispatcher.abort(name)}
        others = [name for name in names if name not in aborted]
        if others and not any(key == FORWARDED for key, _ in context.invocation_metadata() or ()):
            aborted |= await self._peers.abort(others)
            for name in others:
                # Its router may be gone; a replica knows the request by the id that names them both.
                if name not in aborted:
                    self._dispatcher.replicas.abort_everywhere(name)
        return pb.AbortRequestResponse(
            aborted_ids=[name for name in names if name in aborted],
            unknown_ids=[name for name in names if name not in aborted],
        )

    async def GetModelCard(self, request: pb.GetModelCardRequest, context: Any) -> pb.ModelCard:
        """What is served."""
        return await self.card(request.model)

    async def card(self, model: str) -> pb.ModelCard:
        """What is served under a name; the empty one is whichever is served.

        Raises:
            StatusError: NOT_FOUND for another model, UNAVAILABLE without a replica.
        """
        checks.refuse(checks.model_problems("model", model))
        return await self._dispatcher.replicas.card(model)

    async def GetServerLoad(self, request: pb.GetServerLoadRequest, context: Any) -> pb.ServerLoad:
        """Load of every replica as this router sees it."""
        return self.load()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        checks.check_tokenize(request)
        return pb.TokenizeResponse(token_ids=await self._encode(request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """The text of token ids."""
        checks.check_detokenize(request)
        if self._codec is None:
            limit = "cannot be turned into text: the model has no tokenizer"
            raise InvalidRequestError("token_ids", f"{len(request.token_ids)} tokens", limit)
        return pb.DetokenizeResponse(text=await self._codec.decode(request.token_ids))

    def load(self) -> pb.ServerLoad:
        """The router's queue and its view of the replicas."""
        dispatcher = self._dispatcher
        return pb.ServerLoad(
            router_id=dispatcher.config.router_id,
            num_queued=dispatcher.admission.num_waiting,
            replicas=dispatcher.replicas.loads(),
        )

    async def _make(
        self, request: pb.GenerateRequest, time_left_s: float | None, headers: Iterable[tuple[str, str | bytes]]
    ) -> RoutedRequest:
        """A request that was checked and encoded."""
        arrived = time.monotonic()
        if self.is_draining:
            raise StatusError.unavailable("this server takes no new requests", retry_after_s=0.1)
        # Streams go on while a large request is looked at.
        is_large = request.ByteSize() > _LARGE_BYTES
        params = await asyncio.to_thread(check_request, request) if is_large else check_request(request)
        self._dispatcher.replicas.check_model(request.model)
        deadline = _deadline(request, time_left_s, arrived)
        async with _until(deadline):
            token_ids = await self._encode(request)
        seed = params.seed if params.seed is not None else secrets.randbits(_SEED_BITS)
        delivery = Delivery(request, token_ids, seed)
        trace = trace_headers(headers)
        return RoutedRequest(self._dispatcher, request, delivery, arrived=arrived, deadline=deadline, trace=trace)

    async def _encode(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        kind = request.WhichOneof("input")
        if kind == "token_ids" and isinstance(request, pb.GenerateRequest):
            return list(request.token_ids.ids)
        if kind == "text" and self._codec is not None:
            token_ids = await self._codec.encode(request.text)
        else:
            is_text = kind == "text"
            message = pb.TokenizeRequest(text=request.text) if is_text else pb.TokenizeRequest(chat=request.chat)
            token_ids = await self._dispatcher.replicas.encode(message)
        if isinstance(request, pb.GenerateRequest):
            checks.refuse(checks.token_problems(str(kind), token_ids))
        return token_ids

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()


def _about(context: Any) -> dict[str, Any]:
    return {"time_left_s": context.time_remaining(), "headers": context.invocation_metadata() or ()}


def _deadline(request: pb.GenerateRequest, time_left_s: float | None, arrived: float) -> float | None:
    """The earlier one of the call's and the request's, by `time.monotonic`."""
    limits = [] if time_left_s is None else [time_left_s]
    if request.HasField("timeout_ms"):
        limits.append(request.timeout_ms / 1e3)
    return arrived + min(limits) if limits else None


@contextlib.asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise StatusError.deadline_exceeded("the deadline passed") from None
