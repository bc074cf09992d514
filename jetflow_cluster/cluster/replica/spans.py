"""A replica's part of a request's trace, told when it ended."""

from __future__ import annotations

import time

from opentelemetry.trace import SpanKind, StatusCode

from jetflow_cluster.cluster.replica.ticket import TicketUpdate
from jetflow_cluster.rpc.tracing import begin_span
from jetflow_cluster.types import FinishReason


def tell_span(update: TicketUpdate) -> None:
    """The span of a request whose last update this is; its router told which trace it belongs to, or nothing."""
    ticket = update.ticket
    if not ticket.traceparent or ticket.ended_s is None:
        return
    # Moments are those of a clock without a date.
    offset_s = time.time() - time.monotonic()

    def nanoseconds(moment_s: float) -> int:
        return int((moment_s + offset_s) * 1e9)

    headers = {"traceparent": ticket.traceparent}
    span = begin_span("jetflow.replica", SpanKind.SERVER, headers, start_ns=nanoseconds(ticket.arrived_s))
    for name, moment_s in (("scheduled", ticket.scheduled_s), ("first token", ticket.first_token_s)):
        if moment_s is not None:
            span.add_event(name, timestamp=nanoseconds(moment_s))
    request, reason = ticket.request, update.delta.finish_reason
    span.set_attributes(
        {
            "jetflow.request_id": ticket.key.rpartition("#")[0] or ticket.key,
            "jetflow.outcome": str(reason),
            "jetflow.prompt_tokens": len(request.prompt_token_ids),
            "jetflow.cached_tokens": request.usage.cached_tokens,
            "jetflow.num_tokens": request.num_output,
            "jetflow.num_steps": request.speculation.num_steps,
            "jetflow.num_draft_nodes": request.speculation.num_draft_nodes,
            "jetflow.num_accepted_tokens": request.speculation.num_accepted_tokens,
        }
    )
    if reason is FinishReason.ERROR:
        span.set_status(StatusCode.ERROR)
    span.end(nanoseconds(ticket.ended_s))
