"""Spans that continue a caller's trace. Without a configured exporter nothing is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_KEYS = frozenset({"traceparent", "tracestate"})
_PROPAGATOR = TraceContextTextMapPropagator()


def trace_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """What a call's metadata, or HTTP headers in lower case, say of the caller's trace."""
    return {key: value for key, value in metadata or () if key in _KEYS and isinstance(value, str)}


def begin_span(name: str, kind: SpanKind, headers: Mapping[str, str], start_ns: int | None = None) -> Span:
    """A span of the trace that the headers name, or of a new one, begun now or earlier; the caller ends it."""
    parent = _PROPAGATOR.extract(dict(headers), context=Context())
    # Looked up each time: the provider may be set behind the import.
    return trace.get_tracer("jetflow_cluster").start_span(name, context=parent, kind=kind, start_time=start_ns)


def headers_of(span: Span) -> dict[str, str]:
    """What the next process needs to go on with the span's trace; empty when there is none."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, context=trace.set_span_in_context(span, Context()))
    return headers
