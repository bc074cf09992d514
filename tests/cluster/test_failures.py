"""Every process of a served cluster is killed and stopped under load: no token is lost, full strength comes back."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from ray import serve

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc as pb_grpc
from support.served import APP, ROOT, Load, Overview, local_nodes, local_tokens, overview, settings, wait_until

pytestmark = pytest.mark.slow

NUM_TOKENS = 160
NUM_REPLICAS = NUM_ROUTERS = 2
#: Seconds for streams to deliver again, and what full strength may take longer than a cold start.
DELIVER_AGAIN_S, MARGIN_S = 5.0, 5.0


class Deployment:
    """The application on two nodes."""

    def __init__(self, checkpoints: tuple[str, str]):
        config = settings(
            checkpoints,
            tensor_parallel_size=2,
            draft_placement="dedicated",
            num_draft_workers=1,
            num_routers=NUM_ROUTERS,
            drain_timeout_s=5.0,
        )
        self._num_replicas = 1
        began = time.monotonic()
        self._deploy(config)
        #: Seconds from nothing to a replica at full strength.
        self.cold_start_s = time.monotonic() - began
        serve.delete(APP)
        self._num_replicas = NUM_REPLICAS
        self._deploy(config)

    def _deploy(self, config: dict[str, Any]) -> None:
        serve.run(build_app({**config, "num_replicas": self._num_replicas}), name=APP, route_prefix=None)
        wait_until(self.is_complete, 60)

    def loads(self, address: str) -> list[pb.ReplicaLoad]:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.JetFlowInferenceStub(channel)
            return list(stub.GetServerLoad(pb.GetServerLoadRequest(), timeout=5).replicas)

    def is_complete(self) -> bool:
        """Whether all parts run, speculation included, and every router knows it."""
        found = overview()
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
        return [router["address"] for router in overview()["routers"].values()]

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


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[str, str]) -> list[list[int]]:
    return local_tokens(checkpoints, NUM_TOKENS)


@pytest.fixture(scope="module")
def deployment(checkpoints: tuple[str, str]) -> Iterator[Deployment]:
    # Two nodes of this machine, since a node has one router at most.
    with local_nodes([8, 8], [None]):
        yield Deployment(checkpoints)


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
    wait_until(deployment.is_complete, 60)
    before = overview()
    members = before["routers"] if victim == "router" else before["replicas"]
    chosen = next(iter(members.values()))

    def is_replaced() -> bool:
        return chosen["pids"][victim] not in _pids(overview()) and deployment.is_complete()

    with Load(deployment.addresses(), expected, num_rounds=1) as load:
        wait_until(lambda: all(stream.moments for stream in load.current), 60)
        lost_at = time.monotonic()
        os.kill(chosen["pids"][victim], number)
        full_strength_s = wait_until(is_replaced, 120)
        load.join()

    gaps = sorted(stream.longest_gap(lost_at) for stream in load.streams)
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
    assert load.problems == [] and load.num_done == len(expected)
    assert gaps[-1] < DELIVER_AGAIN_S, figures[-1]
    assert full_strength_s < deployment.cold_start_s + MARGIN_S, figures[-1]
    wait_until(deployment.pages_balance, 10)


def _pids(found: Overview) -> set[int]:
    return {pid for kind in found.values() for member in kind.values() for pid in member["pids"].values()}
