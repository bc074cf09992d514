"""An operator changes things under load: no token is lost and no request fails."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.cluster.launch import RAY_ENVIRONMENT
from jetflow_cluster.rpc.client import JetFlowClient
from support.small_models import write_head, write_target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STREAMS, NUM_TOKENS = 32, 120
PROMPTS = [[i + 1, 2 * i + 5, 7, 40 + i] * (1 + i % 5) for i in range(NUM_STREAMS)]


def params(i: int) -> SamplingParams:
    mode = ("auto", "force", "off")[i % 3]
    return SamplingParams(
        max_tokens=NUM_TOKENS,
        seed=i,
        temperature=0.9 if i % 2 else 0.0,
        ignore_eos=True,
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=8 if mode == "force" else None),
    )


class Load:
    """Streams that follow each other as fast as they are served, each compared with what it has to be."""

    def __init__(self, addresses: list[str], expected: list[list[int]], num_streams: int = NUM_STREAMS):
        self._expected = expected
        self._client = JetFlowClient(addresses, timeout_s=120.0)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(num_streams)]
        self._lock = threading.Lock()
        self.num_done = self.num_resumed = 0
        self.replicas: Counter[str] = Counter()
        self.problems: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _run(self, i: int) -> None:
        while not self._stopped.is_set() and not self.problems:
            tokens: list[int] = []
            try:
                with self._client.stream(PROMPTS[i], params(i)) as stream:
                    for delta in stream:
                        tokens += delta.token_ids
                problem = "" if tokens == self._expected[i] else f"{i}: {tokens} is not {self._expected[i]}"
            except Exception as error:
                problem = f"{i}: {type(error).__name__}: {error}"
            with self._lock:
                self.num_done += 1
                if problem:
                    self.problems.append(problem)
                    continue
                assert stream.started is not None and stream.finished is not None
                self.replicas[stream.started.replica_id] += 1
                self.num_resumed += stream.finished.num_resumes + stream.num_calls - 1

    def more(self, count: int, limit_s: float = 60.0) -> None:
        """Waits until so many further requests were served."""
        wanted = self.num_done + count
        wait_until(lambda: self.num_done >= wanted or bool(self.problems), limit_s)
        assert self.problems == []


def wait_until(holds: Callable[[], Any], limit_s: float) -> float:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, f"it did not come to pass within {limit_s:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - began


def overview() -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = (
        serve.get_deployment_handle("Directory", "test").overview.remote().result(timeout_s=20)
    )
    return found


def replicas() -> dict[str, dict[str, Any]]:
    try:
        return overview()["replicas"]
    except Exception:
        return {}


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


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", paths)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        for index in range(2):
            cluster.add_node(num_cpus=2, node_ip_address=f"127.0.0.{index + 2}")
        ray.init(address=cluster.address, configure_logging=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
        serve.start(proxy_location="Disabled")
        yield cluster
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def deploy(checkpoints: tuple[str, str], **config: Any) -> list[str]:
    """Deploys, and waits until all is there; returns the routers' addresses."""
    model, head = checkpoints
    given = {
        "model": model,
        "draft_head": head,
        "dtype": "float64",
        "num_pages": 512,
        "grpc_port": 0,
        "http_port": None,
    }
    given |= {"num_threads_per_actor": 1, "drain_timeout_s": 20.0} | config
    serve.run(build_app(given), name="test", route_prefix=None)
    wait_until(lambda: len(replicas()) == config["num_replicas"] and overview()["routers"], 60)
    addresses = [router["address"] for router in overview()["routers"].values()]
    with JetFlowClient(addresses) as client:
        wait_until(lambda: len(client.server_load().replicas) == config["num_replicas"] and client.health(), 30)
    return addresses


def test_replicas_come_and_go_with_the_load(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]]
) -> None:
    addresses = deploy(
        checkpoints,
        num_replicas=1,
        max_replicas=3,
        target_outstanding_tokens=1000.0,
        load_look_back_s=4.0,
        upscale_delay_s=0.5,
        downscale_delay_s=3.0,
    )
    with Load(addresses, expected, 4) as few:
        with Load(addresses, expected) as load:
            wait_until(lambda: len(replicas()) == 3, 90)
            load.more(64)
            assert load.problems == []
        # Those that go had streams of the few that still run.
        few.more(4)
        wait_until(lambda: len(replicas()) == 1, 90)
        few.more(8)
    assert load.problems == few.problems == []
    assert len(load.replicas) == 3
    print(f"{load.num_done} and {few.num_done} requests, {load.num_resumed + few.num_resumed} resumes")


def test_another_configuration_fails_no_request(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]]
) -> None:
    port = 23_900 + os.getpid() % 1000
    addresses = deploy(checkpoints, num_replicas=1, grpc_port=port)
    before = overview()
    with Load(addresses, expected) as load:
        load.more(16)
        deploy(checkpoints, num_replicas=1, grpc_port=port, max_num_requests=24)

        def is_replaced() -> bool:
            found = overview()
            old = [set(before[kind]) & set(found[kind]) for kind in before]
            return not any(old) and all(found.values())

        wait_until(is_replaced, 90)
        load.more(64)
    assert load.problems == []
    assert set(load.replicas) >= set(overview()["replicas"])
    print(f"{load.num_done} requests, {load.num_resumed} resumes")


def test_a_node_that_is_gone_loses_no_token(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]]
) -> None:
    addresses = deploy(checkpoints, num_replicas=3, num_cpus_per_actor=2.0, max_surge_percent=0)
    hosts = {name: replica["address"].rpartition(":")[0] for name, replica in replicas().items()}
    assert len(set(hosts.values())) == 3, hosts
    router_hosts = {address.rpartition(":")[0] for address in addresses}
    node = next(node for node in nodes.worker_nodes if node.node_ip_address not in router_hosts)
    (victim,) = [name for name, host in hosts.items() if host == node.node_ip_address]
    with Load(addresses, expected) as load:
        load.more(32)
        nodes.remove_node(node, allow_graceful=False)
        wait_until(lambda: victim not in replicas() and replicas(), 30)
        load.more(64)
        nodes.add_node(num_cpus=2, node_ip_address="127.0.0.9")
        wait_until(lambda: len(replicas()) == 3, 120)
        load.more(32)
    assert load.problems == []
    assert load.num_resumed > 0
    print(f"{load.num_done} requests, {load.num_resumed} resumes")
