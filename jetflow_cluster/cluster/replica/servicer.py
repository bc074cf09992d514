"""The service that routers attach to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.encoder import Encoder
from jetflow_cluster.cluster.replica.events import events_of, load_to_proto, refused
from jetflow_cluster.cluster.replica.intake import request_from_proto
from jetflow_cluster.cluster.replica.model_card import model_card
from jetflow_cluster.cluster.replica.roster import Roster, Running
from jetflow_cluster.cluster.replica.session import RouterSession
from jetflow_cluster.cluster.replica.spans import tell_span
from jetflow_cluster.cluster.replica.step_loop import StepLoop
from jetflow_cluster.cluster.replica.ticket import LoopReport, LoopState, NotServingError
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.convert import started_to_proto
from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc
from jetflow_cluster.types import InvalidRequestError

_log = logging.getLogger(__name__)


class ReplicaServicer(replica_pb2_grpc.JetFlowReplicaServicer):
    """`JetFlowReplica` over one engine. Belongs to one event loop.

    A request is in the engine under a key of its own, so what is said of a request that was aborted is never taken for
    another one of that name. A router that attaches again ends its earlier stream; a request of the earlier stream
    that it submits again within the grace begins anew behind its prior tokens, whose pages are still cached.

    Args:
        config: of the replica.
        frontend: of the engine, which nobody else may use from `start` on.
        on_state: called when the step loop drains, fails or stops.
    """

    def __init__(
        self,
        config: ReplicaServerConfig,
        frontend: EngineFrontend,
        *,
        on_state: Callable[[LoopState], None] = lambda state: None,
    ):
        self._config, self._frontend, self._on_state = config, frontend, on_state
        self._card = model_card(config, frontend)
        self._encoder = Encoder(frontend)
        self._serial = itertools.count(1)
        self._roster = Roster()
        self._state = LoopState.RUNNING
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self.step_loop = StepLoop(
            frontend.engine,
            self._receive,
            max_failed_steps=config.max_failed_steps,
            num_trace_slots=config.num_trace_slots,
        )

    def start(self) -> None:
        """Begins to step; called in the event loop."""
        self._event_loop = asyncio.get_running_loop()
        self.step_loop.start()

    async def Attach(self, frames: AsyncIterator[rpb.RouterFrame], context: Any) -> None:
        """One router's stream; see the proto."""
        first = await self._first_frame(frames)
        session = self._attach(first.hello)
        reader = asyncio.create_task(self._read(session, first, frames))
        try:
            # By itself: a first frame that is broken off would keep the metadata, without which no status can be sent.
            with contextlib.suppress(grpc.aio.UsageError, grpc.aio.InternalError):
                await context.send_initial_metadata(())
            await session.write_to(context.write)
        finally:
            self._detach(session)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def Encode(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids by the model's tokenizer and chat template."""
        return pb.TokenizeResponse(token_ids=await self._encoder.encode(request))

    async def Describe(self, request: pb.GetModelCardRequest, context: Any) -> pb.ModelCard:
        """What is served."""
        if request.model not in ("", self._card.model):
            raise StatusError.not_found("this model is not served here")
        return self._card

    def load(self) -> pb.ReplicaLoad:
        """The load at this moment."""
        drafter = self._frontend.engine.drafter
        return load_to_proto(self.step_loop.load(), replica_id=self._config.replica_id, drafter=drafter)

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new; returns when nothing runs any more.

        Returns:
            False when requests were left behind `timeout_s`: their routers were told to go elsewhere.
        """
        drained = asyncio.wrap_future(self.step_loop.drain())
        self._note_state()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(drained)
            return True
        except TimeoutError:
            self._hand_over()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.max_step_s):
                await drained
        return False

    async def stop(self) -> None:
        """Ends everything: running requests are handed over, streams end behind what is to be told."""
        self.step_loop.drain()
        self._hand_over()
        for session in self._roster.streams():
            session.close()
        # In a thread that ends with this call, where one of the event loop's own would stay.
        loop, limit_s = asyncio.get_running_loop(), self._config.max_step_s
        if not await loop.run_in_executor(self._encoder.executor, self.step_loop.stop, limit_s):
            _log.error("a step has run for %.0f s; its thread is left behind", self.step_loop.step_age_s)
        self._encoder.close()

    async def _first_frame(self, frames: AsyncIterator[rpb.RouterFrame]) -> rpb.RouterFrame:
        try:
            async with asyncio.timeout(self._config.hello_timeout_s):
                first = await anext(aiter(frames), None)
        except TimeoutError:
            raise StatusError.deadline_exceeded("no frame came") from None
        if first is None or not first.HasField("hello"):
            raise InvalidFieldsError([InvalidRequestError("hello", None, "must be in the first frame")])
        checks.refuse(checks.id_problems("hello.router_id", first.hello.router_id, optional=False))
        if first.hello.grace_ms > self._config.max_grace_s * 1e3:
            limit = f"must be at most {self._config.max_grace_s * 1e3:.0f}"
            raise InvalidFieldsError([InvalidRequestError("hello.grace_ms", first.hello.grace_ms, limit)])
        return first

    def _attach(self, hello: rpb.Hello) -> RouterSession:
        earlier = self._roster.stream_of(hello.router_id)
        if earlier is not None:
            earlier.break_off(StatusError.unavailable("the router attached anew"))
            self._detach(earlier)
        owner = f"{hello.router_id}/{next(self._serial)}"
        session = RouterSession(hello.router_id, owner, hello.grace_ms / 1e3, self._config, self.load)
        self._roster.attach(session)
        return session

    def _detach(self, session: RouterSession) -> None:
        """Behind a stream; its requests go on for the grace that it asked for. May be called twice."""
        self._roster.detach(session)
        if session.grace_s and session.keys:
            asyncio.get_running_loop().call_later(session.grace_s, self._end_session, session)
        else:
            self._end_session(session)

    def _end_session(self, session: RouterSession) -> None:
        if self._roster.end(session):
            self.step_loop.abort_owner(session.owner)

    async def _read(
        self, session: RouterSession, first: rpb.RouterFrame, frames: AsyncIterator[rpb.RouterFrame]
    ) -> None:
        try:
            self._take(session, first)
            async for frame in frames:
                if frame.HasField("hello"):
                    raise InvalidFieldsError([InvalidRequestError("hello", "again", "must be in the first frame only")])
                self._take(session, frame)
        except InvalidRequestError as error:
            session.break_off(StatusError.invalid_argument([error]))
        except (grpc.aio.UsageError, grpc.aio.InternalError):
            # Read from a call that has ended.
            session.close()
        except Exception:
            _log.exception("the stream of router %s failed", session.router_id)
            session.break_off(StatusError.internal())
        else:
            session.close()

    def _take(self, session: RouterSession, frame: rpb.RouterFrame) -> None:
        if not session.is_open:
            # What begins behind the end of its stream would run for nobody.
            return
        for submit in frame.submits:
            session.put([self._submit(session, submit)])
        named = [self._roster.by_id(abort.request_id) for abort in frame.aborts]
        if keys := [running.key for running in named if running is not None]:
            self.step_loop.abort(keys)

    def _submit(self, session: RouterSession, submit: rpb.Submit) -> rpb.ReplicaEvent:
        """The answer to a submission: `Started` or `Refused`."""
        try:
            return self._begin(session, submit)
        except InvalidRequestError as error:
            return refused(submit.request_id, rpb.REFUSAL_CODE_INVALID, error)
        except NotServingError as error:
            is_lost = error.state is LoopState.FAILED
            return refused(submit.request_id, rpb.REFUSAL_CODE_INTERNAL if is_lost else rpb.REFUSAL_CODE_DRAINING)
        except Exception:
            _log.exception("request %r could not be submitted", submit.request_id)
            return refused(submit.request_id, rpb.REFUSAL_CODE_INTERNAL)

    def _begin(self, session: RouterSession, submit: rpb.Submit) -> rpb.ReplicaEvent:
        arrived_s = time.monotonic()
        earlier = self._roster.by_id(submit.request_id)
        if earlier is not None and earlier.session.is_open:
            raise InvalidRequestError("request_id", submit.request_id, "is the id of a request that runs")
        key = f"{submit.request_id}#{next(self._serial)}"
        limit = self._config.max_frame_bytes
        request = request_from_proto(self._frontend, submit, key=key, max_logprobs_bytes=limit)
        started = started_to_proto(
            request_id=submit.request_id,
            replica_id=self._config.replica_id,
            model=self._card.model,
            seed=request.seed,
            prompt_token_ids=request.prompt_token_ids,
        )
        if earlier is not None:
            self.step_loop.abort([earlier.key])
            self._roster.forget(earlier)
        traceparent = submit.traceparent
        self.step_loop.submit(request, owner=session.owner, arrived_s=arrived_s, traceparent=traceparent)
        running = Running(request_id=submit.request_id, key=key, session=session)
        self._roster.add(running)
        if submit.HasField("timeout_ms"):
            loop = asyncio.get_running_loop()
            running.timer = loop.call_later(submit.timeout_ms / 1e3, self.step_loop.abort, [key])
        return rpb.ReplicaEvent(request_id=submit.request_id, started=started)

    def _hand_over(self) -> None:
        """Gives up what runs, so that routers take it elsewhere."""
        given_up = self._roster.requests()
        self.step_loop.abort([running.key for running in given_up])
        for running in given_up:
            running.session.put([refused(running.request_id, rpb.REFUSAL_CODE_DRAINING)])
            self._roster.forget(running)

    def _receive(self, report: LoopReport) -> None:
        """Takes a report from the loop's thread to the event loop."""
        assert self._event_loop is not None
        self._event_loop.call_soon_threadsafe(self._deliver, report)

    def _deliver(self, report: LoopReport) -> None:
        for update in report.updates:
            if update.delta.finish_reason is not None:
                tell_span(update)
            running = self._roster.by_key(update.ticket.key)
            if running is None:
                continue
            try:
                events = events_of(running.request_id, update)
            except Exception:
                _log.exception("what request %s became could not be told", update.ticket.key)
                events = [refused(running.request_id, rpb.REFUSAL_CODE_INTERNAL)]
                self.step_loop.abort([running.key])
            running.session.put(events, report.step)
            if events and events[-1].WhichOneof("event") in ("finished", "refused"):
                self._roster.forget(running)
        self._note_state()

    def _note_state(self) -> None:
        state = self.step_loop.state
        if state is not self._state:
            self._state = state
            for session in self._roster.streams():
                session.nudge()
            self._on_state(state)
