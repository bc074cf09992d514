"""The thread that owns an engine: takes commands between steps, and reports each step."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from jetflow_cluster.cluster.replica.ledger import TicketLedger
from jetflow_cluster.cluster.replica.meter import StepCounts
from jetflow_cluster.cluster.replica.stage_ring import StageRing
from jetflow_cluster.cluster.replica.ticket import (
    LoopLoad,
    LoopReport,
    LoopState,
    NotServingError,
    Ticket,
    TicketUpdate,
)
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import FinishReason

_log = logging.getLogger(__name__)

#: Takes reports, in the loop's thread, in their order.
Sink = Callable[[LoopReport], None]


class StepLoop:
    """Steps an engine in a thread of its own while there is work, and sleeps while there is none.

    Commands may come from any thread; they take effect between two steps or while one is computed, in their order.
    Nothing else may touch the engine between `start` and the end of `stop`.

    A step that fails ends its own requests, as `Engine.step` says. The loop fails as a whole when an exception comes
    out of the step, or when too many steps fail in a row: then every request ends with reason ``error``, and so does
    every one that still comes in.

    Args:
        engine: what is stepped.
        sink: told of each step with all its updates at once, and of commands that end requests or change the state.
        max_failed_steps: steps that may fail in a row.
        num_trace_slots: stages that `trace` can tell of.
    """

    def __init__(self, engine: Engine, sink: Sink, *, max_failed_steps: int = 8, num_trace_slots: int = 65_536):
        #: The exception that the loop failed of.
        self.failure: BaseException | None = None
        self._engine, self._sink = engine, sink
        self._max_failed_steps, self._num_failed_steps = max_failed_steps, 0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._state = self._told_state = LoopState.RUNNING
        self._is_ending = False
        self._ledger = TicketLedger(time.monotonic())
        self._updates: list[TicketUpdate] = []
        self._waiters: list[Future[None]] = []
        self._step_began_s: float | None = None
        self._stats = engine.stats()
        self._stages = StageRing(num_trace_slots)
        self._thread = threading.Thread(target=self._run, name="jetflow-step-loop", daemon=True)

    @property
    def state(self) -> LoopState:
        """What the loop does."""
        return self._state

    @property
    def step_age_s(self) -> float:
        """Seconds that the present step has taken so far; 0 between steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def start(self) -> None:
        """Begins to step."""
        self._engine.on_stage = self._stages.begin
        self._engine.while_computing = self._obey_waiting
        self._thread.start()

    def submit(self, request: Request, *, owner: str, arrived_s: float | None = None, traceparent: str = "") -> Ticket:
        """Queues a request. Its updates come to the sink.

        Args:
            request: made by the engine's front end; its id was never used before.
            owner: see `abort_owner`.
            arrived_s: moment of `time.monotonic` that its timing counts from; None is now.
            traceparent: of the span that the request is a part of.

        Raises:
            NotServingError: the loop takes nothing new.
        """
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        ticket = Ticket(request=request, owner=owner, arrived_s=arrived_s, traceparent=traceparent)
        with self._lock:
            if self._state is not LoopState.RUNNING:
                raise NotServingError(self._state)
            self._inbox.put(lambda: self._add(ticket))
        return ticket

    def abort(self, keys: Iterable[str]) -> None:
        """Ends requests with reason ``abort``; those that have ended are left alone."""
        chosen = list(keys)
        self._inbox.put(lambda: self._abort(chosen))

    def abort_owner(self, owner: str) -> None:
        """Ends all requests of one owner with reason ``abort``."""
        self._inbox.put(lambda: self._abort([t.key for t in self._ledger.tickets() if t.owner == owner]))

    def drain(self) -> Future[None]:
        """Takes nothing new from now on; the future is done when no request is left."""
        drained: Future[None] = Future()
        with self._lock:
            if self._state is LoopState.STOPPED:
                drained.set_result(None)
                return drained
            if self._state is LoopState.RUNNING:
                self._state = LoopState.DRAINING
            self._inbox.put(lambda: self._waiters.append(drained))
        return drained

    def stop(self, timeout_s: float | None = None) -> bool:
        """Aborts what runs and ends the thread. Safe to call again.

        Returns:
            False when a step held the thread up for longer than `timeout_s`.
        """
        with self._lock:
            self._state = LoopState.STOPPED
            self._inbox.put(self._end)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def load(self) -> LoopLoad:
        """How busy the loop is. Does not wait."""
        rates = self._ledger.rates(time.monotonic())
        return LoopLoad(
            state=self._state,
            stats=self._stats,
            outstanding_tokens=self._ledger.outstanding_tokens,
            tokens_per_s=rates.tokens_per_s,
            mean_acceptance_length=rates.mean_acceptance_length,
            time_to_first_token_s=self._ledger.time_to_first_token_s(time.monotonic()),
        )

    @property
    def counts(self) -> StepCounts:
        """All that steps did so far."""
        return self._ledger.counts

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """The stages of the steps of the last seconds as Chrome trace events; see `StageRing.events`."""
        return self._stages.events(seconds)

    @property
    def _has_work(self) -> bool:
        return self.failure is None and not self._is_ending and self._engine.has_work

    def _run(self) -> None:
        while not self._is_ending:
            if self._inbox.qsize() or not self._has_work:
                self._obey()
            if self._has_work:
                self._step()

    def _obey(self) -> None:
        """Runs the commands that are there; waits for one when there are none."""
        self._run_commands([self._inbox.get(), *(self._inbox.get() for _ in range(self._inbox.qsize()))])

    def _obey_waiting(self) -> None:
        """Runs the commands that are there."""
        if num := self._inbox.qsize():
            self._run_commands([self._inbox.get() for _ in range(num)])

    def _run_commands(self, commands: Iterable[Callable[[], None]]) -> None:
        for command in commands:
            try:
                command()
            except Exception as error:
                self._fail(error)
        self._report()

    def _step(self) -> None:
        began_s = self._step_began_s = time.monotonic()
        self._stages.begin_step(self._engine.num_steps)
        try:
            deltas = self._engine.step()
        except BaseException as error:
            self._fail(error)
            return
        finally:
            self._stages.end_step()
            self._step_began_s = None
        self._ledger.note_scheduled(began_s)
        updates = self._ledger.note_deltas(deltas, time.monotonic())
        self._updates += updates
        self._count_failures(updates)
        self._report()

    def _add(self, ticket: Ticket) -> None:
        self._ledger.add(ticket)
        if self.failure is not None:
            self._end_one(ticket, FinishReason.ERROR)
            return
        try:
            self._engine.add(ticket.request)
        except Exception:
            _log.exception("request %s could not be queued", ticket.key)
            self._end_one(ticket, FinishReason.ERROR)

    def _abort(self, keys: Iterable[str]) -> None:
        ended = [self._engine.abort(key) for key in keys if key in self._ledger]
        self._updates += self._ledger.note_deltas([d for d in ended if d is not None], time.monotonic())

    def _end(self) -> None:
        self._is_ending = True
        if self.failure is None:
            self._abort([ticket.key for ticket in self._ledger.tickets()])
        for ticket in self._ledger.tickets():
            # Its prior tokens had ended it, and no step comes to say so.
            self._end_one(ticket, ticket.request.finish_reason or FinishReason.ABORT)

    def _end_one(self, ticket: Ticket, reason: FinishReason) -> None:
        ticket.request.finish_reason = reason
        self._updates.append(self._ledger.end(ticket, reason, time.monotonic()))

    def _fail(self, error: BaseException) -> None:
        """The engine is not touched any more: what it holds is not known."""
        if self.failure is not None:
            return
        with self._lock:
            self.failure = error
            if self._state is not LoopState.STOPPED:
                self._state = LoopState.FAILED
        root = _root_cause(error)
        _log.critical("the engine is lost: %s: %s", type(root).__name__, root, exc_info=error)
        for ticket in self._ledger.tickets():
            self._end_one(ticket, FinishReason.ERROR)
        self._report()

    def _count_failures(self, updates: list[TicketUpdate]) -> None:
        failed = [update for update in updates if update.delta.finish_reason is FinishReason.ERROR]
        self._num_failed_steps = self._num_failed_steps + 1 if failed else 0
        if self._num_failed_steps > self._max_failed_steps:
            error = RuntimeError(f"{self._num_failed_steps} steps failed in a row")
            error.__cause__ = failed[-1].ticket.request.error
            self._fail(error)

    def _report(self) -> None:
        """Tells the sink what came up since the last report, if anything did."""
        self._stats = self._engine.stats()
        if not self._ledger:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)
        state = self._state
        if not self._updates and state is self._told_state:
            return
        updates, self._updates, self._told_state = self._updates, [], state
        try:
            self._sink(LoopReport(step=self._engine.num_steps, state=state, updates=updates))
        except Exception as error:
            # Nobody is left to tell.
            self._sink = lambda report: None
            self._fail(error)


def _root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        error = cause
    return error
