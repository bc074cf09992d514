"""One request on its way: admitted, placed, followed, and placed again when its replica is lost."""

from __future__ import annotations

import ast
import asyncio
import logging
import time
from collections.abc import Mapping

import grpc

from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.router.admission import Waiter
from jetflow_cluster.router.attempts import Attempts
from jetflow_cluster.router.delivery import Delivery, ReplicaFaultError
from jetflow_cluster.router.dispatcher import Dispatcher
from jetflow_cluster.router.flight import Flight
from jetflow_cluster.router.inbox import DELTA, ENDED, FINISHED, LOST, REFUSED, STARTED, Inbox
from jetflow_cluster.router.watch import Emit, RequestWatch
from jetflow_cluster.rpc.convert import started_to_proto
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.types import InvalidRequestError

_log = logging.getLogger(__name__)


class _AbortedError(Exception):
    """The request was aborted on the wish of its caller."""


class RoutedRequest:
    """Runs one request over as many replicas as it takes.

    Args:
        dispatcher: of the router.
        message: the checked request.
        delivery: knows its prompt and seed.
        arrived: when it came, and `deadline`, when it must have ended, by `time.monotonic`.
        deadline: None is no limit.
        trace: headers of the caller's trace.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        message: pb.GenerateRequest,
        delivery: Delivery,
        *,
        arrived: float,
        deadline: float | None,
        trace: Mapping[str, str] | None = None,
    ):
        #: The id that the client knows; empty until a replica is chosen if the client left it out.
        self.request_id = message.request_id
        self._dispatcher, self._delivery = dispatcher, delivery
        self._model, self._session_id = message.model, message.session_id
        self._echo_prompt = message.WhichOneof("input") != "token_ids"
        self._pages = PageKeys(dispatcher.config.prefix_page_size)
        self._arrived, self._deadline = arrived, deadline
        self._waited_s, self._first_token_at = 0.0, 0.0
        self._emit: RequestWatch
        self._trace = trace or {}
        self._inbox = Inbox()
        self._waiter: Waiter[Flight] | None = None
        self._flight: Flight | None = None
        self._avoided: set[str] = set()
        self._attempts = Attempts(dispatcher.config.max_fruitless_attempts)
        #: Why the request is to end before it finished.
        self._ended: Exception | None = None
        self._abort_timer: asyncio.TimerHandle | None = None

    async def run(self, emit: Emit) -> None:
        """Emits `Started`, deltas, and `Finished`. However it ends, the replica has nothing of it then.

        Raises:
            StatusError: as documented for the API; ABORTED when deltas came and no replica could go on.
            InvalidRequestError: a replica cannot honour the request, or its id is taken.
        """
        watch = self._emit = RequestWatch(self._dispatcher.metrics, emit, arrived=self._arrived, headers=self._trace)
        error: BaseException | None = None
        try:
            await self._run_watched()
        except BaseException as reason:
            error = reason
            raise
        finally:
            watch.end(error, request_id=self.request_id, num_resumes=self._delivery.num_resumes)

    async def _run_watched(self) -> None:
        timer: asyncio.TimerHandle | None = None
        try:
            self._dispatcher.register(self)
            if self._deadline is not None:
                delay_s = self._deadline - time.monotonic()
                timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self._expire)
            await self._run()
        except _AbortedError:
            if not self._delivery.has_begun:
                raise StatusError.cancelled("the request was aborted") from None
            for event in self._delivery.aborted():
                await self._end_with(event)
        finally:
            if self._flight is not None:
                self._flight.release()
            for handle in (timer, self._abort_timer):
                if handle is not None:
                    handle.cancel()
            self._dispatcher.forget(self)

    def abort(self) -> None:
        """Ends the request with what was delivered; its replica says the last word, if it does so soon."""
        if self._ended is not None or self._abort_timer is not None:
            return
        if self._flight is None or self._flight.is_over:
            self.end(_AbortedError())
            return
        self._flight.abort()
        grace_s = self._dispatcher.config.abort_grace_s
        self._abort_timer = asyncio.get_running_loop().call_later(grace_s, self.end, _AbortedError())

    def _expire(self) -> None:
        self.end(StatusError.deadline_exceeded("the deadline passed"))

    def end(self, error: Exception) -> None:
        """Ends the request from outside: the replica is told at once, whatever the stream is doing."""
        self._ended = self._ended or error
        if self._flight is not None:
            self._flight.release()
        if self._waiter is not None:
            self._waiter.refuse(self._ended)
        self._inbox.put(ENDED, self._ended)

    async def _run(self) -> None:
        dispatcher = self._dispatcher
        num_tokens = dispatcher.num_tokens(self._delivery)
        self._flight = await self._wait(dispatcher.admission.enter(num_tokens, self._place, deadline=self._deadline))
        while not await self._follow():
            self._flight = await self._next_flight()

    async def _wait(self, waiter: Waiter[Flight]) -> Flight:
        before, self._waiter = time.monotonic(), waiter
        try:
            flight = await waiter.wait()
        finally:
            self._waiter = None
            self._waited_s += time.monotonic() - before
        if not self.request_id:
            self.request_id = flight.wire_id
            self._dispatcher.register(self)
        return flight

    def _place(self) -> Flight | None:
        timeout_s = None if self._deadline is None else self._deadline - time.monotonic()
        inbox = Inbox()
        flight = self._dispatcher.place(
            self._delivery,
            inbox,
            model=self._model,
            session_id=self._session_id,
            page_keys=self._dispatcher.page_keys(self._pages, self._delivery.prompt_token_ids),
            avoided=self._avoided,
            timeout_s=timeout_s,
            traceparent=self._emit.traceparent,
        )
        if flight is not None:
            self._inbox = inbox
            self._attempts.began(self._delivery.num_output)
        return flight

    async def _follow(self) -> bool:
        """Passes on what the replica says; False when another one has to go on."""
        inbox, delivery, emit = self._inbox, self._delivery, self._emit
        while True:
            kind, payload = await inbox.get()
            try:
                if kind == DELTA:
                    delta = delivery.take(payload)
                    if not delivery.has_begun:
                        await self._begin()
                    if delta is not None:
                        await emit(pb.GenerateEvent(delta=delta))
                        self._first_token_at = self._first_token_at or time.monotonic()
                elif kind == FINISHED:
                    self._check_in_time(payload)
                    events = delivery.finish(payload)
                    self._dispatcher.note_cached(self._replica_id, self._pages, delivery)
                    await self._begin()
                    for event in events:
                        await self._end_with(event)
                    return True
                elif kind == STARTED:
                    await self._begin()
                elif kind == ENDED:
                    raise payload
                else:
                    return self._leave(kind, payload)
            except ReplicaFaultError as fault:
                _log.error("replica %s is wrong about %s: %s", self._replica_id, self.request_id, fault)
                return self._leave(LOST, None)

    def _check_in_time(self, finished: pb.Finished) -> None:
        # The replica knows the deadline too, and its word may be read before this router's own timer.
        is_aborted = finished.finish_reason == pb.FINISH_REASON_ABORT
        if is_aborted and self._deadline is not None and time.monotonic() >= self._deadline:
            raise StatusError.deadline_exceeded("the deadline passed")

    def _leave(self, kind: str, refusal: rpb.Refused | None) -> bool:
        """Notes why the replica does not go on; raises if no other one can."""
        assert self._flight is not None
        is_internal = False
        if kind == REFUSED and refusal is not None:
            if refusal.code == rpb.REFUSAL_CODE_INVALID and not self._delivery.num_delivered:
                raise InvalidRequestError(refusal.field, _value_of(refusal), refusal.limit)
            if refusal.code == rpb.REFUSAL_CODE_DRAINING:
                self._flight.link.refuses_new()
            else:
                is_internal = True
        self._attempts.failed(self._delivery.num_output, is_internal=is_internal)
        self._avoided = {self._flight.replica_id}
        self._flight.release()
        return False

    async def _next_flight(self) -> Flight:
        """Another replica's place."""
        self._delivery.lost()
        if self._attempts.are_enough:
            raise self._failure()
        await asyncio.sleep(self._attempts.pause_s)
        if self._ended is not None:
            raise self._ended
        if self._abort_timer is not None:
            raise _AbortedError
        try:
            num_tokens = self._dispatcher.num_tokens(self._delivery)
            waiter = self._dispatcher.admission.enter_again(num_tokens, self._place)
            return await self._wait(waiter)
        except StatusError as error:
            # What the caller decided stays; what replicas lack ends a stream that has begun in another way.
            is_said = error is self._ended or error.code is grpc.StatusCode.ABORTED
            raise error if is_said else self._failure() from None

    def _failure(self) -> StatusError:
        return self._attempts.failure(self._delivery.num_delivered, self._delivery.num_output)

    async def _begin(self) -> None:
        """Tells the client once that the request runs."""
        if self._delivery.has_begun:
            return
        self._delivery.has_begun = True
        started = started_to_proto(
            request_id=self.request_id,
            replica_id=self._replica_id,
            model=self._flight.model if self._flight is not None else "",
            seed=self._delivery.seed,
            prompt_token_ids=self._delivery.prompt_token_ids,
            echo_prompt=self._echo_prompt,
            arithmetic=self._delivery.arithmetic,
        )
        await self._emit(pb.GenerateEvent(started=started))

    async def _end_with(self, event: pb.GenerateEvent) -> None:
        """Emits one of the last events; times are those that this router saw, and the client's."""
        if event.HasField("finished"):
            timing = event.finished.timing
            timing.queue_s += self._waited_s
            timing.total_s = time.monotonic() - self._arrived
            timing.time_to_first_token_s = max(0.0, self._first_token_at - self._arrived)
        await self._emit(event)

    @property
    def _replica_id(self) -> str:
        return self._flight.replica_id if self._flight is not None else ""


def _value_of(refusal: rpb.Refused) -> object:
    """The refused value, which the replica wrote as a literal, and cut if it was long."""
    try:
        return ast.literal_eval(refusal.value)
    except (ValueError, SyntaxError):
        return refusal.value
