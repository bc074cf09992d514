"""Every process of a served cluster is killed and stopped under load: no token is lost, full strength comes back."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.cluster.launch import RAY_ENVIRONMENT
from jetflow_cluster.rpc.client import JetFlowClient
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc as pb_grpc
from support.small_models import write_head, write_target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STREAMS, NUM_TOKENS = 32, 160
NUM_REPLICAS = NUM_ROUTERS = 2
#: Seconds for streams to deliver again, and what full strength may take longer than a cold start.
DELIVER_AGAIN_S, MARGIN_S = 5.0, 5.0


def params(i: int) -> SamplingParams:
    mode = ("auto", "force", "off")[i % 3]
    return SamplingParams(
        max_tokens=NUM_TOKENS,
        seed=i,
        temperature=0.9 if i % 2 else 0.0,
        ignore_eos=True,
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=8 if mode == "force" else None),
    )


PROMPTS = [[i + 1, 2 * i + 5, 7, 40 + i] * (1 + i % 5) for i in range(NUM_STREAMS)]


@dataclass
class Stream:
    """What one client saw."""

    tokens: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    def longest_gap(self, since: float) -> float:
        """Longest wait for a delta that ended after a moment."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return max((after - before for before, after in pairs if after > since), default=0.0)


class Deployment:
    """The application on two nodes, with a client of both routers."""

    def __init__(self, checkpoints: tuple[str, str]):
        model, head = checkpoints
        config = {
            "model": model,
            "draft_head": head,
            "dtype": "float64",
            "num_pages": 512,
            "grpc_port": 0,
            "http_port": None,
            "tensor_parallel_size": 2,
            "draft_placement": "dedicated",
            "num_draft_workers": 1,
            "num_routers": NUM_ROUTERS,
            "num_threads_per_actor": 1,
            "drain_timeout_s": 5.0,
        }
        self._num_replicas = 1
        began = time.monotonic()
        self._deploy(config)
        #: Seconds from nothing to a replica at full strength.
        self.cold_start_s = time.monotonic() - began
        serve.delete("test")
        self._num_replicas = NUM_REPLICAS
        self._deploy(config)

    def _deploy(self, config: dict[str, Any]) -> None:
        serve.run(build_app({**config, "num_replicas": self._num_replicas}), name="test", route_prefix=None)
        self.wait_until(self.is_complete, 60)

    def overview(self) -> dict[str, dict[str, dict[str, Any]]]:
        directory = serve.get_deployment_handle("Directory", "test")
        found: dict[str, dict[str, dict[str, Any]]] = directory.overview.remote().result(timeout_s=20)
        return found

    def loads(self, address: str) -> list[pb.ReplicaLoad]:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.JetFlowInferenceStub(channel)
            return list(stub.GetServerLoad(pb.GetServerLoadRequest(), timeout=5).replicas)

    def is_complete(self) -> bool:
        """Whether all parts run, speculation included, and every router knows it."""
        found = self.overview()
        if len(found["replicas"]) != self._num_replicas or len(found["routers"]) != NUM_ROUTERS:
            return False
        if any(len(replica["pids"]) != 4 for replica in found["replicas"].values()):
            return False
        try:
            for router in found["routers"].values():
                loads = self.loads(router["address"])
                if {load.replica_id for load in loads if load.healthy and load.speculating} != set(found["replicas"]):
                    return False
        except Exception:
            return False
        return True

    def addresses(self) -> list[str]:
        return [router["address"] for router in self.overview()["routers"].values()]

    def pages_balance(self) -> bool:
        for address in self.addresses():
            for load in self.loads(address):
                if (
                    load.num_running
                    or load.num_waiting
                    or load.num_free_pages + load.num_cached_pages != load.num_pages
                ):
                    return False
        return True

    @staticmethod
    def wait_until(holds: Callable[[], bool], seconds: float) -> float:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < seconds, f"{holds.__name__} did not hold within {seconds:.1f} s"
            time.sleep(0.1)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, head = (tmp_path_factory.mktemp(name) for name in ("target", "head"))
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    return str(target), str(head)


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[str, str]) -> list[list[int]]:
    llm = LLM(*checkpoints, dtype="float64", num_pages=1024, tree_nodes={1: 8})
    return [o.token_ids for o in llm.generate(PROMPTS, [params(i) for i in range(NUM_STREAMS)])]


@pytest.fixture(scope="module")
def deployment(checkpoints: tuple[str, str]) -> Iterator[Deployment]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        # Two nodes of this machine, since a node has one router at most.
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
        cluster.add_node(num_cpus=8)
        ray.init(address=cluster.address, configure_logging=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
        serve.start(proxy_location="Disabled")
        yield Deployment(checkpoints)
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def figures() -> Iterator[list[dict[str, Any]]]:
    """What each case took; written to out/failures.json."""
    rows: list[dict[str, Any]] = []
    yield rows
    path = ROOT / "out" / "failures.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("victim", ["shard 0", "shard 1", "draft worker 0", "engine replica", "router"])
def test_a_lost_process_loses_no_token(
    deployment: Deployment,
    expected: list[list[int]],
    figures: list[dict[str, Any]],
    victim: str,
    number: signal.Signals,
) -> None:
    deployment.wait_until(deployment.is_complete, 60)
    before = deployment.overview()
    members = before["routers"] if victim == "router" else before["replicas"]
    chosen = next(iter(members.values()))
    streams = [Stream() for _ in range(NUM_STREAMS)]
    under_way = threading.Semaphore(0)

    with JetFlowClient(deployment.addresses(), timeout_s=120.0) as client:

        def run(i: int) -> None:
            for delta in client.stream(PROMPTS[i], params(i)):
                if not streams[i].tokens:
                    under_way.release()
                streams[i].tokens += delta.token_ids
                streams[i].moments.append(time.monotonic())

        with ThreadPoolExecutor(NUM_STREAMS + 1) as threads:
            futures = [threads.submit(run, i) for i in range(NUM_STREAMS)]
            for _ in range(NUM_STREAMS):
                under_way.acquire()
            lost_at = time.monotonic()
            os.kill(chosen["pids"][victim], number)

            def is_replaced() -> bool:
                return chosen["pids"][victim] not in _pids(deployment.overview()) and deployment.is_complete()

            replaced = threads.submit(deployment.wait_until, is_replaced, 120)
            for future in futures:
                future.result(timeout=120)
            full_strength_s = replaced.result()

    gaps = sorted(stream.longest_gap(lost_at) for stream in streams)
    figures.append(
        {
            "victim": victim,
            "signal": number.name,
            "longest_gap_s": round(gaps[-1], 2),
            "median_gap_s": round(statistics.median(gaps), 2),
            "full_strength_s": round(full_strength_s, 2),
            "cold_start_s": round(deployment.cold_start_s, 2),
        }
    )
    assert [stream.tokens for stream in streams] == expected
    assert gaps[-1] < DELIVER_AGAIN_S, figures[-1]
    assert full_strength_s < deployment.cold_start_s + MARGIN_S, figures[-1]
    deployment.wait_until(deployment.pages_balance, 10)


def _pids(overview: dict[str, dict[str, dict[str, Any]]]) -> set[int]:
    return {pid for kind in overview.values() for member in kind.values() for pid in member["pids"].values()}
