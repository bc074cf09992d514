"""What one Serve handle call per stream, held open beside the data stream, costs a router.

Run as ``python docs/results/lease/measure.py``; it writes lease.json beside this file. Two routers of one build stand
before one synthetic replica, each in a process of its own. One opens a handle call for each stream and ends it with
the stream; the other does not. Requests go to both in turns.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import serve

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.report import write_json
from jetflow_cluster.bench.router_load import REPLICA_ID, TOKENS_PER_DELTA, _main, _obey, _serve_replica
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.flight import Flight
from jetflow_cluster.router.replica_link import ReplicaLink
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc

NUM_PAIRS, NUM_DELTAS, NUM_CONCURRENT = 300, 16, 16
PROMPT = list(range(64))


class Holder:
    """Stands for an engine replica: a call is open as long as its stream is."""

    async def hold(self, request_id: str) -> None:
        """Until it is cancelled."""
        await asyncio.Event().wait()

    async def cpu_s(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()


def open_leases(handle: Any) -> None:
    """From now on, every request that this process sends to a replica has a call open until it leaves the replica."""
    submit, release = ReplicaLink.submit, Flight.release
    calls: dict[str, Any] = {}

    def submit_and_lease(link: ReplicaLink, message: Any, *args: Any, **options: Any) -> Flight:
        flight = submit(link, message, *args, **options)
        calls[flight.wire_id] = handle.hold.remote(flight.wire_id)
        return flight

    def release_lease(flight: Flight) -> None:
        release(flight)
        if (call := calls.pop(flight.wire_id, None)) is not None:
            call.cancel()

    ReplicaLink.submit = submit_and_lease  # type: ignore[method-assign]
    Flight.release = release_lease  # type: ignore[method-assign]


async def serve_router(connection: Connection) -> None:
    """A router process; told the replica's address and whether it leases."""
    replica, address, leases = connection.recv()
    if leases:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
        open_leases(serve.get_deployment_handle("Holder", "lease"))
    server = RouterServer(RouterConfig(host="127.0.0.1", port=0, silence_s=30.0))
    port = await server.start()
    server.set_replicas({REPLICA_ID: replica})
    while not server.is_serving:
        await asyncio.sleep(0.01)
    await _obey(connection, f"127.0.0.1:{port}")
    await server.stop()


class Measured:
    """A process, its address and its CPU time."""

    def __init__(self, target: Any, *told: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(target, theirs), daemon=True)
        self.process.start()
        for each in told:
            self.connection.send(each)
        self.address: str = self.connection.recv()

    def cpu_s(self) -> float:
        """So far."""
        self.connection.send(None)
        seconds: float = self.connection.recv()
        return seconds

    def end(self) -> None:
        """Ends it."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()


def message(num_deltas: int) -> pb.GenerateRequest:
    """A request of so many deltas."""
    sampling = pb.SamplingParams(max_tokens=num_deltas * TOKENS_PER_DELTA, seed=1, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)


async def first_delta_s(stub: Any, num_deltas: int) -> float:
    """Seconds to the first delta of a stream that is read to its end."""
    began, took = time.perf_counter(), 0.0
    async for event in stub.GenerateStream(message(num_deltas)):
        if not took and event.HasField("delta"):
            took = time.perf_counter() - began
    return took


async def measure(routers: dict[str, Measured]) -> dict[str, Any]:
    """Latency in turns, then CPU per stream, one at a time and many."""
    found: dict[str, Any] = {name: {} for name in routers}
    channels = {name: grpc.aio.insecure_channel(router.address) for name, router in routers.items()}
    stubs = {name: inference_pb2_grpc.JetFlowInferenceStub(channel) for name, channel in channels.items()}
    times: dict[str, list[float]] = {name: [] for name in routers}
    for i in range(NUM_PAIRS + 20):
        for name in list(routers) if i % 2 else list(routers)[::-1]:
            took = await first_delta_s(stubs[name], NUM_DELTAS)
            if i >= 20:
                times[name].append(took)
    for name, took_s in times.items():
        found[name]["first_delta_ms"] = round(1e3 * statistics.median(took_s), 3)
        found[name]["first_delta_p95_ms"] = round(1e3 * statistics.quantiles(took_s, n=20)[-1], 3)
    pairs = list(zip(*times.values(), strict=True))
    found["added_ms"] = round(1e3 * statistics.median(leased - bare for bare, leased in pairs), 3)
    for name, router in routers.items():
        for label, width in (("one_at_a_time", 1), (f"{NUM_CONCURRENT}_at_a_time", NUM_CONCURRENT)):
            cpu_s, began = router.cpu_s(), time.perf_counter()
            for _ in range(NUM_PAIRS // width):
                await asyncio.gather(*(first_delta_s(stubs[name], NUM_DELTAS) for _ in range(width)))
            count = NUM_PAIRS // width * width
            found[name][f"router_cpu_ms_per_stream_{label}"] = round(1e3 * (router.cpu_s() - cpu_s) / count, 3)
            found[name][f"streams_per_s_{label}"] = round(count / (time.perf_counter() - began), 1)
    for channel in channels.values():
        await channel.close()
    return found


def main() -> None:
    """Measures and writes lease.json beside this file."""
    context = ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    address = context.address_info["address"]
    # A second driver on this cluster needs the token that this one made.
    os.environ["RAY_AUTH_MODE"] = "token"
    serve.start(proxy_location="Disabled")
    holder = serve.deployment(Holder).options(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    handle = serve.run(holder.bind(), name="lease", route_prefix=None)
    replica = Measured(_serve_replica)
    try:
        routers = {
            "without": Measured(serve_router, (replica.address, address, False)),
            "with_lease": Measured(serve_router, (replica.address, address, True)),
        }
        before = handle.cpu_s.remote().result()
        found = asyncio.run(measure(routers))
        used = handle.cpu_s.remote().result() - before
        num_streams = NUM_PAIRS + 20 + NUM_PAIRS + NUM_PAIRS // NUM_CONCURRENT * NUM_CONCURRENT
        found["replica_cpu_ms_per_lease"] = round(1e3 * used / num_streams, 3)
        found |= {"machine": describe_machine(), "deltas_per_stream": NUM_DELTAS, "num_pairs": NUM_PAIRS}
        write_json(found, Path(__file__).with_name("lease.json"))
        sys.stdout.write(f"{found}\n")
        for router in routers.values():
            router.end()
    finally:
        replica.end()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
