"""What is told of each request: metrics, a span and a line of the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from opentelemetry.trace import SpanKind, StatusCode

from jetflow_cluster import metrics as m
from jetflow_cluster.metrics import Metrics
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.tracing import begin_span, headers_of
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError

_log = logging.getLogger("jetflow_cluster.requests")
_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length", pb.FINISH_REASON_ABORT: "abort"}
_NO_REASON = "unspecified"

Emit = Callable[[pb.GenerateEvent], Awaitable[Any]]


class RequestWatch:
    """Stands between a request and its client, from arrival to `end`.

    Args:
        metrics: are told.
        emit: takes the events.
        arrived: by `time.monotonic`.
        headers: of the caller's trace.
    """

    def __init__(self, metrics: Metrics, emit: Emit, *, arrived: float, headers: Mapping[str, str]):
        self._metrics, self._emit, self._arrived = metrics, emit, arrived
        self._span = begin_span("jetflow.request", SpanKind.SERVER, headers)
        #: For the replica, so that its span is a part of this one.
        self.traceparent = headers_of(self._span).get("traceparent", "")
        self._last_delta = 0.0
        self._num_tokens = 0
        self._replica_id = ""
        self._finished: pb.Finished | None = None

    async def __call__(self, event: pb.GenerateEvent) -> None:
        """Passes an event on, and counts it."""
        kind = event.WhichOneof("event")
        if kind == "finished":
            # Who has it may hang up before this server learns that it was taken.
            self._finished = event.finished
        await self._emit(event)
        if kind == "delta" and event.delta.token_ids:
            self._note_delta(len(event.delta.token_ids))
        elif kind == "started":
            self._replica_id = event.started.replica_id

    def end(self, error: BaseException | None, *, request_id: str, num_resumes: int) -> None:
        """Tells how it ended: with `Finished`, or with an error."""
        total_s = time.monotonic() - self._arrived
        outcome = self._outcome(error)
        self._metrics.observe(m.E2E_LATENCY, total_s)
        if num_resumes:
            self._metrics.add(m.REQUEST_RESUMES, num_resumes)
        told: dict[str, Any] = {
            "request_id": request_id,
            "replica_id": self._replica_id,
            "outcome": outcome,
            "num_tokens": self._num_tokens,
            "num_resumes": num_resumes,
            "total_s": round(total_s, 4),
        }
        if self._finished is not None:
            told |= self._note_finished(self._finished)
        _log.info("request %s: %s", request_id, outcome, extra=told)
        for name, value in told.items():
            self._span.set_attribute(f"jetflow.{name}", value)
        if outcome not in (*_REASONS.values(), _NO_REASON):
            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end()

    def _note_delta(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self._last_delta:
            self._metrics.observe(m.INTER_TOKEN_LATENCY, (now - self._last_delta) / num_tokens)
        else:
            self._metrics.observe(m.TIME_TO_FIRST_TOKEN, now - self._arrived)
            self._span.add_event("first token")
        self._last_delta = now
        self._num_tokens += num_tokens
        self._metrics.add(m.GENERATION_TOKENS, num_tokens)

    def _outcome(self, error: BaseException | None) -> str:
        if self._finished is not None and (error is None or isinstance(error, asyncio.CancelledError)):
            reason = _REASONS.get(self._finished.finish_reason, _NO_REASON)
            self._metrics.add(m.REQUEST_SUCCESS, finished_reason=reason)
            if reason == "abort":
                self._metrics.add(m.REQUEST_CANCELS, cause="abort")
            return reason
        code = "INTERNAL"
        if isinstance(error, asyncio.CancelledError):
            code = "CANCELLED"
            self._metrics.add(m.REQUEST_CANCELS, cause="client")
        elif isinstance(error, StatusError):
            code = error.code.name
            if code in ("CANCELLED", "DEADLINE_EXCEEDED"):
                self._metrics.add(m.REQUEST_CANCELS, cause="abort" if code == "CANCELLED" else "deadline")
        elif isinstance(error, InvalidRequestError):
            code = "INVALID_ARGUMENT"
        self._metrics.add(m.REQUEST_FAILURES, code=code)
        return code

    def _note_finished(self, finished: pb.Finished) -> dict[str, Any]:
        self._metrics.observe(m.QUEUE_TIME, finished.timing.queue_s)
        self._metrics.add(m.PROMPT_TOKENS, finished.usage.prompt_tokens)
        return {
            "prompt_tokens": finished.usage.prompt_tokens,
            "cached_tokens": finished.usage.cached_tokens,
            "queue_s": round(finished.timing.queue_s, 4),
            "time_to_first_token_s": round(finished.timing.time_to_first_token_s, 4),
            "num_spec_steps": finished.speculation.num_spec_steps,
            "mean_acceptance_length": round(finished.speculation.mean_acceptance_length, 3),
        }
