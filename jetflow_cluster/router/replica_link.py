"""The connection to one replica: one stream for all requests, watched, and made anew when it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import grpc

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.flight import Flight
from jetflow_cluster.router.inbox import DELTA, FINISHED, LOST, REFUSED, Inbox
from jetflow_cluster.router.outbox import Outbox
from jetflow_cluster.router.replica_stream import ReplicaStream
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb

_log = logging.getLogger(__name__)


class ReplicaLink:
    """A replica as this router sees it. Belongs to one event loop.

    The link is healthy once the replica was described and says of its load that it is. It is quarantined at the first
    error, and behind `silence_s` without a frame: its requests get `LOST`, and it is tried again with growing pauses.

    Args:
        replica_id: name of the replica.
        address: ``host:port`` of its data plane.
        config: of the router.
        on_change: called when the replica becomes able or unable to take requests.
        on_lost: called with the link when all that the replica knew is gone.
        on_freed: called behind each frame, and when a request ends, with the tokens that need not be computed any more.
    """

    def __init__(
        self,
        replica_id: str,
        address: str,
        config: RouterConfig,
        *,
        on_change: Callable[[], None],
        on_lost: Callable[[ReplicaLink], None],
        on_freed: Callable[[int], None],
    ):
        self.replica_id, self.address = replica_id, address
        #: What the replica serves; None before it was first reached.
        self.card: pb.ModelCard | None = None
        #: What it last told of its load.
        self.load = pb.ReplicaLoad(replica_id=replica_id)
        self._config = config
        self._on_change, self._on_lost, self._on_freed = on_change, on_lost, on_freed
        self._flights: dict[str, Flight] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._outbox = Outbox(config.router_id)
        #: Whether there is a stream, and whether the replica was described since it was made.
        self._has_frames = self._is_described = False
        #: Attempts to connect since the replica was last described.
        self._num_failures = 0
        self._is_retired = self._is_closed = self._could_serve = False
        #: Tokens of this router's requests, and of all others when the replica last told its load.
        self._own_tokens = self._others_tokens = 0
        self._stream: ReplicaStream | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_healthy(self) -> bool:
        """False while the replica is quarantined, or says that it cannot serve."""
        return self._has_frames and self._is_described and self.load.healthy

    @property
    def is_draining(self) -> bool:
        """True when it takes nothing new, by its own word or because it leaves."""
        return self._is_retired or self.load.draining

    @property
    def can_serve(self) -> bool:
        """True when new requests may go there."""
        return self.is_healthy and not self.is_draining

    @property
    def num_flights(self) -> int:
        """Requests of this router that it has."""
        return len(self._flights)

    @property
    def own_tokens(self) -> int:
        """Tokens that it has still to compute for this router."""
        return self._own_tokens

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that it has still to compute, other routers' requests included as far as it told."""
        return self._own_tokens + self._others_tokens

    def start(self) -> None:
        """Begins to connect; does not wait."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link {self.replica_id}")

    async def retire(self) -> None:
        """Takes nothing new, lets what runs end (at most `drain_timeout_s`), and closes."""
        self._is_retired = True
        self._note_change()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("replica %s leaves with %d requests", self.replica_id, self.num_flights)
        await self.close()

    def take_back(self) -> bool:
        """Ends a `retire` that has not come to its end; the caller cancels it. False when it is too late."""
        if self._is_closed:
            return False
        self._is_retired = False
        self._note_change()
        return True

    async def close(self) -> None:
        """Ends the connection; requests that it still has get `LOST`."""
        self._is_retired = self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, submit: rpb.Submit, inbox: Inbox, *, num_output_tokens: int) -> Flight:
        """Sends a request; its events go to the inbox.

        Args:
            submit: what is sent.
            inbox: of the request.
            num_output_tokens: most tokens of its output, prior ones included.
        """
        num_prior = len(submit.sampling.prior_output_token_ids)
        flight = Flight(
            link=self,
            wire_id=submit.request_id,
            inbox=inbox,
            num_prompt_tokens=len(submit.token_ids) + num_prior,
            num_output_tokens=max(0, num_output_tokens - num_prior),
        )
        self._flights[flight.wire_id] = flight
        self._idle.clear()
        self._own_tokens += flight.tokens_left
        self._outbox.submit(submit)
        return flight

    def abort(self, request_id: str) -> None:
        """Ends a request on the replica, whoever sent it there. Does nothing while there is no stream."""
        if self._has_frames:
            self._outbox.abort(request_id)

    def release(self, flight: Flight) -> None:
        """Forgets a request, and aborts it if the replica still has it. For `Flight.release`."""
        if not flight.is_over:
            freed = self._forget(flight)
            self._outbox.abort(flight.wire_id)
            self._own_tokens -= freed
            self._on_freed(freed)

    def refuses_new(self) -> None:
        """Notes that the replica drains, as it will tell of its load soon."""
        self.load.draining = True
        self._note_change()

    async def encode(self, request: pb.TokenizeRequest, timeout_s: float) -> pb.TokenizeResponse:
        """Token ids by the replica's tokenizer and chat template. Raises `grpc.RpcError`."""
        if self._stream is None:
            raise RuntimeError("the link was not started")
        return await self._stream.encode(request, timeout_s)

    async def _run(self) -> None:
        while True:
            try:
                await self._new_stream().run()
            except Exception as error:
                self._num_failures += 1
                if self._num_failures == 1:
                    _log.warning("replica %s is quarantined: %s", self.replica_id, _reason(error))
            if self._is_retired:
                return
            pause_s = self._config.min_probe_pause_s * 2.0 ** min(self._num_failures - 1, 30)
            await asyncio.sleep(min(pause_s, self._config.max_probe_pause_s) * random.uniform(0.75, 1.0))

    def _new_stream(self) -> ReplicaStream:
        self._stream = ReplicaStream(
            self.address,
            self._config,
            self._outbox,
            on_card=self._note_card,
            on_frame=self._take,
            on_break=self._lose,
        )
        return self._stream

    def _note_card(self, card: pb.ModelCard) -> None:
        self.card, self._is_described = card, True
        if self._num_failures:
            _log.info("replica %s answers again", self.replica_id)
        self._num_failures = 0
        self._note_change()

    def _take(self, frame: rpb.ReplicaFrame) -> None:
        """Hands a frame's events to the requests."""
        self._has_frames = True
        freed = 0
        for event in frame.events:
            flight = self._flights.get(event.request_id)
            kind = event.WhichOneof("event")
            if flight is None or kind is None:
                continue
            payload = getattr(event, kind)
            if kind == DELTA:
                freed += flight.computed(len(payload.token_ids))
            elif kind in (FINISHED, REFUSED):
                freed += self._forget(flight)
            flight.inbox.put(kind, payload)
        self._own_tokens -= freed
        if frame.HasField("load"):
            self.load = frame.load
            self._others_tokens = max(0, frame.load.outstanding_tokens - self._own_tokens)
            self._note_change()
        self._on_freed(freed)

    def _lose(self) -> None:
        flights, self._flights = self._flights, {}
        self._has_frames = self._is_described = False
        self._own_tokens = self._others_tokens = 0
        self.load = pb.ReplicaLoad(replica_id=self.replica_id)
        self._outbox.reset(aborts=flights)
        self._idle.set()
        # Nothing is to be sent here any more when the requests look for another replica.
        self._note_change()
        self._on_lost(self)
        for flight in flights.values():
            flight.is_over = True
            flight.tokens_left = 0
            flight.inbox.put(LOST)

    def _forget(self, flight: Flight) -> int:
        """The replica has nothing of a request any more; returns the tokens that it need not compute."""
        del self._flights[flight.wire_id]
        flight.is_over = True
        freed, flight.tokens_left = flight.tokens_left, 0
        if not self._flights:
            self._idle.set()
        return freed

    def _note_change(self) -> None:
        if self._could_serve is not self.can_serve:
            self._could_serve = self.can_serve
            self._on_change()


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
