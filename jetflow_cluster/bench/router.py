"""`jetflow bench router`: what a router costs, against a replica that only speaks the protocol."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import track

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.bench.router_load import TOKENS_PER_DELTA, RouterUnderLoad, router_under_load
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc, replica_pb2_grpc
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb

_PROMPT = list(range(64))


@dataclass(frozen=True, kw_only=True)
class RouterBenchConfig:
    """Everything that decides a measurement."""

    #: Where ``results.json`` and ``router.png`` go.
    output_dir: Path
    #: Requests sent through the router and directly, in turns, for the added latency.
    num_pairs: int = 300
    #: Concurrent streams of each measurement of the throughput.
    num_streams: tuple[int, ...] = (1, 8, 32, 128)
    #: Deltas of each such measurement.
    num_deltas: int = 20_000
    #: Measurements of each.
    num_repeats: int = 3


def run_router_bench(config: RouterBenchConfig, console: Console) -> dict[str, Any]:
    """Measures, writes ``results.json`` and the picture, and returns the former's content."""
    with router_under_load() as load:
        latencies = asyncio.run(_latencies(load, config, console))
        rows = []
        for num_streams in track(config.num_streams, "throughput", console=console, transient=True):
            runs = [asyncio.run(_flood(load, num_streams, config.num_deltas)) for _ in range(config.num_repeats)]
            rows.append(_row(num_streams, runs))
    added = [through - direct for direct, through in latencies]
    results = {
        "machine": describe_machine(),
        "latency": {
            "num_pairs": config.num_pairs,
            "direct_ms": round(1e3 * statistics.median(direct for direct, _ in latencies), 3),
            "through_router_ms": round(1e3 * statistics.median(through for _, through in latencies), 3),
            "added_ms": round(1e3 * statistics.median(added), 3),
            "added_p95_ms": round(1e3 * statistics.quantiles(added, n=20)[-1], 3),
        },
        "tokens_per_delta": TOKENS_PER_DELTA,
        "rows": rows,
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(results, config.output_dir / "results.json")
    _draw(results, [1e3 * value for value in added], config.output_dir / "router.png")
    return results


def _message(num_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=num_tokens, seed=1, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=_PROMPT), sampling=sampling)


async def _latencies(load: RouterUnderLoad, config: RouterBenchConfig, console: Console) -> list[tuple[float, float]]:
    """Seconds to the first delta, directly and through the router."""
    found = []
    async with (
        grpc.aio.insecure_channel(load.replica_address) as replica,
        grpc.aio.insecure_channel(load.router_address) as router,
    ):
        direct = _Direct(replica)
        await direct.open()
        stub = inference_pb2_grpc.JetFlowInferenceStub(router)
        for i in track(range(config.num_pairs + 10), "latency", console=console, transient=True):
            if i % 2:
                pair = (await direct.first_delta_s(f"direct-{i}"), await _first_delta_s(stub))
            else:
                through = await _first_delta_s(stub)
                pair = (await direct.first_delta_s(f"direct-{i}"), through)
            found.append(pair)
        direct.close()
    return found[10:]


async def _first_delta_s(stub: Any) -> float:
    began = time.perf_counter()
    took = 0.0
    async for event in stub.GenerateStream(_message(TOKENS_PER_DELTA)):
        if not took and event.HasField("delta"):
            took = time.perf_counter() - began
    return took


class _Direct:
    """A client of the replica itself, which speaks to it as a router does."""

    def __init__(self, channel: Any):
        self._call = replica_pb2_grpc.JetFlowReplicaStub(channel).Attach()

    async def open(self) -> None:
        await self._call.write(rpb.RouterFrame(hello=rpb.Hello(router_id="bench")))
        await self._call.read()

    async def first_delta_s(self, name: str) -> float:
        message = _message(TOKENS_PER_DELTA)
        began = time.perf_counter()
        submit = rpb.Submit(request_id=name, token_ids=message.token_ids.ids, sampling=message.sampling)
        await self._call.write(rpb.RouterFrame(submits=[submit]))
        took = 0.0
        while True:
            for event in (await self._call.read()).events:
                if not took and event.HasField("delta"):
                    took = time.perf_counter() - began
                if event.HasField("finished"):
                    return took

    def close(self) -> None:
        self._call.cancel()


async def _flood(load: RouterUnderLoad, num_streams: int, num_deltas: int) -> dict[str, float]:
    """Deltas per second, and what the router used for each."""
    deltas_each = num_deltas // num_streams
    async with grpc.aio.insecure_channel(load.router_address) as channel:
        stub = inference_pb2_grpc.JetFlowInferenceStub(channel)

        async def read() -> int:
            count = 0
            async for event in stub.GenerateStream(_message(deltas_each * TOKENS_PER_DELTA)):
                count += event.HasField("delta")
            return count

        await read()
        cpu_s, began = load.router_cpu_s(), time.perf_counter()
        counts = await asyncio.gather(*(read() for _ in range(num_streams)))
        took_s, cpu_s = time.perf_counter() - began, load.router_cpu_s() - cpu_s
    total = sum(counts)
    if total != deltas_each * num_streams:
        raise RuntimeError(f"{total} deltas came of {deltas_each * num_streams}")
    return {"deltas_per_s": total / took_s, "cpu_us_per_delta": 1e6 * cpu_s / total}


def _row(num_streams: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    cpu_us = statistics.median(run["cpu_us_per_delta"] for run in runs)
    return {
        "name": f"{num_streams} streams",
        "num_streams": num_streams,
        "deltas_per_s": round(statistics.median(run["deltas_per_s"] for run in runs)),
        "cpu_us_per_delta": round(cpu_us, 1),
        "deltas_per_s_and_core": round(1e6 / cpu_us),
    }


def _draw(results: dict[str, Any], added_ms: Sequence[float], path: Path) -> None:
    plt = load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    longest = 2 * max(results["latency"]["added_p95_ms"], 0.5)
    left.hist([min(value, longest) for value in added_ms], bins=40, color="#0b7a75")
    left.axvline(results["latency"]["added_ms"], color="black", linestyle="--", linewidth=1)
    left.set_xlabel("milliseconds that the router adds to the first delta")
    left.set_title(f"latency: median {results['latency']['added_ms']:.2f} ms", loc="left", fontsize=10)
    rows = results["rows"]
    bars = right.bar([row["name"] for row in rows], [row["deltas_per_s_and_core"] for row in rows], color="#0b7a75")
    right.bar_label(bars, fontsize=8)
    right.set_title("deltas per second and core of the router", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
