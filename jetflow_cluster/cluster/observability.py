"""Logs and spans of one process of a served cluster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from pythonjsonlogger.json import JsonFormatter

from jetflow_cluster.cluster.config import ClusterConfig

_FIELDS = ("asctime", "levelname", "name", "message")


def observe_process(config: ClusterConfig, process: Mapping[str, str]) -> None:
    """Sets up this process's log and, where the configuration names a collector, its spans.

    Args:
        config: of the cluster.
        process: what this process is, such as ``router_id``; on every line and span.

    Raises:
        ImportError: spans are wanted, and the extra ``tracing`` is not installed.
    """
    set_up_log(config.log_level, config.log_format, process)
    if config.trace_endpoint is not None:
        _set_up_spans(config.trace_endpoint, process)


def set_up_log(level: str, form: str, process: Mapping[str, str]) -> None:
    """Sends what this project logs, and only that, to standard error: ``json`` lines, or ``text``."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        fields = " ".join(f"%({name})s" for name in _FIELDS)
        handler.setFormatter(JsonFormatter(fields, rename_fields=names, static_fields=dict(process)))
    else:
        told = " ".join(process.values())
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {told} %(name)s: %(message)s"))
    logger = logging.getLogger("jetflow_cluster")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _set_up_spans(endpoint: str, process: Mapping[str, str]) -> None:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes = {"service.name": "jetflow"} | {f"jetflow.{name}": value for name, value in process.items()}
    provider = TracerProvider(resource=Resource.create(attributes))
    insecure = not endpoint.startswith("https://")
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=insecure)))
    trace.set_tracer_provider(provider)
