"""What is told of requests: every metric of the catalogue, a span per process, a line of the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jetflow_cluster import SamplingParams, SpeculationOptions
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.metrics import CATALOGUE
from jetflow_cluster.router.watch import RequestWatch
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from support.recorded import RecordedMetrics
from support.router_stack import Stack, stack
from support.toy_cluster import run, until

FORCED = SpeculationOptions(mode="force", max_tree_nodes=8)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def params(max_tokens: int, seed: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1.0, seed=seed, speculation=FORCED)


async def _end_in_every_way(made: Stack) -> None:
    client, prompt = made.client, list(range(1, 41))
    await client.generate(prompt, params(12))
    await client.generate(prompt, params(12))
    stream = client.stream(prompt, params(150))
    await anext(stream)
    for wire in made.wires:
        wire.cut()
    await asyncio.sleep(0.05)
    stream.cancel()
    stream = client.stream(prompt, params(100))
    async for _ in stream:
        if stream.num_calls == 1 and len(stream.output.token_ids) < 20:
            for wire in made.wires:
                wire.cut()
    stream = client.stream(prompt, params(400), request_id="to-abort")
    await anext(stream)
    await client.abort("to-abort")
    async for _ in stream:
        pass
    with pytest.raises(StatusError):
        await client.generate(prompt, params(400), timeout_s=0.1)
    # More than the pages hold.
    await asyncio.gather(*(client.generate([i + 1] * 30, params(120, i)) for i in range(20)))


def test_every_metric_is_told(frontends: list[EngineFrontend], target: Path) -> None:
    told = RecordedMetrics()

    async def test() -> None:
        async with stack(frontends, target, told) as made:
            await _end_in_every_way(made)
            await made.is_idle()
            await until(lambda: told.names >= {metric.name for metric in CATALOGUE}, 10)
            await until(lambda: told.gauges["jetflow_num_requests_running"] == 0)

    try:
        run(test)
    finally:
        assert {metric.name for metric in CATALOGUE} - told.names == set()
    count = told.counts
    assert count["jetflow_request_success/length"] == 23
    assert count["jetflow_request_success/abort"] == count["jetflow_request_cancels/abort"] == 1
    assert count["jetflow_request_cancels/client"] + count["jetflow_request_cancels/deadline"] == 2
    assert count["jetflow_request_resumes"] >= 1
    num_requests = count["jetflow_request_success"] + count["jetflow_request_failures"]
    assert len(told.observed["jetflow_e2e_request_latency_seconds"]) == num_requests == 26
    accepted, drafts = count["jetflow_spec_decode_num_accepted_tokens"], count["jetflow_spec_decode_num_drafts"]
    per_position = [count[f"jetflow_spec_decode_num_accepted_tokens_per_pos/{i}"] for i in range(16)]
    assert sum(per_position) == accepted > 0
    assert per_position == sorted(per_position, reverse=True) and per_position[0] <= drafts
    assert count["jetflow_spec_decode_num_nodes_verified"] >= count["jetflow_spec_decode_num_draft_tokens"] + drafts
    assert told.observed["jetflow_inter_token_latency_seconds"]
    # These engines have a table of tree sizes instead of a policy that measures.
    assert count["jetflow_spec_decode_steps/given"] == count["jetflow_engine_steps"] > 0


def test_a_client_that_hangs_up_behind_the_last_event_has_cancelled_nothing() -> None:
    told = RecordedMetrics()

    async def emit(event: pb.GenerateEvent) -> None:
        if event.HasField("finished"):
            raise asyncio.CancelledError

    async def test() -> None:
        watch = RequestWatch(told, emit, arrived=time.monotonic(), headers={})
        await watch(pb.GenerateEvent(started=pb.Started(request_id="r", replica_id="a")))
        await watch(pb.GenerateEvent(delta=pb.Delta(token_ids=[1])))
        with pytest.raises(asyncio.CancelledError):
            await watch(pb.GenerateEvent(finished=pb.Finished(finish_reason=pb.FINISH_REASON_LENGTH)))
        watch.end(asyncio.CancelledError(), request_id="r", num_resumes=0)

    run(test)
    assert told.counts["jetflow_request_success/length"] == 1
    assert not {name for name in told.counts if "cancels" in name or "failures" in name}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    processor = SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    yield exporter
    processor.shutdown()


def test_spans_and_lines_name_the_callers_trace_and_request(
    frontends: list[EngineFrontend],
    target: Path,
    spans: InMemorySpanExporter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = pb.GenerateRequest(request_id="traced", token_ids=pb.TokenIds(ids=[1, 2, 3]))
    message.sampling.max_tokens, message.sampling.ignore_eos = 8, True
    headers = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)

    async def test() -> None:
        async with stack(frontends, target) as made:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{made.router.port}") as channel:
                stub = inference_pb2_grpc.JetFlowInferenceStub(channel)
                async for _ in stub.GenerateStream(message, metadata=headers):
                    pass
            await until(lambda: len(spans.get_finished_spans()) == 2)

    with caplog.at_level(logging.INFO, "jetflow_cluster.requests"):
        run(test)
    replica, router = sorted(spans.get_finished_spans(), key=lambda span: span.name)
    assert (router.name, replica.name) == ("jetflow.request", "jetflow.replica")
    assert {f"{span.context.trace_id:032x}" for span in (router, replica)} == {TRACE_ID}
    assert router.parent is not None and f"{router.parent.span_id:016x}" == PARENT_ID
    assert replica.parent is not None and replica.parent.span_id == router.context.span_id
    assert router.attributes is not None and router.attributes["jetflow.request_id"] == "traced"
    assert replica.attributes is not None and replica.attributes["jetflow.num_tokens"] == 8
    assert [event.name for event in replica.events] == ["scheduled", "first token"]
    assert router.start_time <= replica.start_time + 50_000_000 and replica.end_time is not None
    (line,) = [record for record in caplog.records if record.name == "jetflow_cluster.requests"]
    assert (line.request_id, line.outcome, line.num_tokens) == ("traced", "length", 8)  # type: ignore[attr-defined]


def test_lines_are_json_with_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    from jetflow_cluster.cluster.observability import set_up_log

    logger = logging.getLogger("jetflow_cluster")
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        set_up_log("info", "json", {"router_id": "r-1", "process": "router"})
        logging.getLogger("jetflow_cluster.requests").info("request %s: %s", "a", "stop", extra={"request_id": "a"})
        logging.getLogger("jetflow_cluster.requests").debug("not told")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    (line,) = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "jetflow_cluster.requests",
        "message": "request a: stop",
        "request_id": "a",
        "router_id": "r-1",
        "process": "router",
    }
