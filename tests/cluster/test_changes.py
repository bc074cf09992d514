"""An operator changes things under 32 streams: no token is wrong, missing or repeated, and no request fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from ray import serve
from ray.cluster_utils import Cluster

from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.rpc.client import JetFlowClient
from support.served import (
    APP,
    PROMPTS,
    Load,
    Stream,
    deploy_file,
    local_nodes,
    local_tokens,
    overview,
    params,
    replicas,
    settings,
    wait_until,
)

pytestmark = pytest.mark.slow

NUM_TOKENS, NUM_LONG_TOKENS, NUM_SHORT_TOKENS = 120, 600, 24


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[str, str]) -> list[list[int]]:
    return local_tokens(checkpoints, NUM_LONG_TOKENS)


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with local_nodes([2, 2, 2], ["127.0.0.2", "127.0.0.3"]) as found:
        yield found


def deploy(checkpoints: tuple[str, str], **config: Any) -> list[str]:
    """Deploys, and waits until all is there; returns the routers' addresses."""
    given = settings(checkpoints, **{"drain_timeout_s": 20.0} | config)
    serve.run(build_app(given), name=APP, route_prefix=None)
    return ready(config["num_replicas"], config.get("num_routers", 1))


def ready(num_replicas: int, num_routers: int = 1) -> list[str]:
    """Waits until so many replicas and as many routers serve; returns the routers' addresses."""
    wait_until(lambda: len(replicas()) == num_replicas and len(overview()["routers"]) == num_routers, 90)
    addresses = [router["address"] for router in overview()["routers"].values()]
    with JetFlowClient(addresses) as client:
        wait_until(lambda: len(client.server_load().replicas) == num_replicas and client.health(), 30)
    return addresses


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class HttpLoad:
    """Streams by OpenAI's client, which must not have to try again."""

    NUM_STREAMS = 4

    def __init__(self, host: str, port: int, expected: list[list[int]]):
        self._client = OpenAI(api_key="none", base_url=f"http://{host}:{port}/v1", max_retries=0)
        self._model = self._client.models.list().data[0].id
        self._expected = expected
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(self.NUM_STREAMS)]
        self.num_done = 0
        self.problems: list[str] = []

    def __enter__(self) -> HttpLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _run(self, i: int) -> None:
        extra = {"ignore_eos": True, "return_token_ids": True}
        common: dict[str, Any] = {"model": self._model, "max_tokens": NUM_TOKENS, "stream": True, "extra_body": extra}
        while not self._stopped.is_set() and not self.problems:
            tokens: list[int] = []
            try:
                temperature = params(i, NUM_TOKENS).temperature
                chunks = self._client.completions.create(prompt=PROMPTS[i], temperature=temperature, seed=i, **common)
                for chunk in chunks:
                    tokens += getattr(chunk.choices[0], "token_ids", ())
            except Exception as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            if tokens != self._expected[i][:NUM_TOKENS]:
                self.problems.append(f"{i}: {tokens}")
            self.num_done += 1


def tell(load: Load, *more: str) -> None:
    print("; ".join([f"{load.num_done} requests", f"{load.num_resumes} resumes", *more]))


@pytest.mark.parametrize("drain_timeout_s", [60.0, 0.5], ids=["drained", "handed over"])
def test_fewer_replicas_while_all_streams_run(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]], drain_timeout_s: float
) -> None:
    config = {"num_pages": 2048, "drain_timeout_s": drain_timeout_s}
    deploy_file(checkpoints, 3, **config)
    addresses = ready(3)
    before = replicas()
    with Load(addresses, expected, num_rounds=1) as load:
        wait_until(load.all_run, 60)
        deploy_file(checkpoints, 1, **config)
        took_s = wait_until(lambda: len(replicas()) == 1, 60)
        assert load.all_run(), "streams ended before the replicas left"
        (kept,) = replicas()
        had = {name: [s for s in load.streams if s.replica_id == name] for name in before}
        processes = [pid for name in before if name != kept for pid in before[name]["pids"].values()]
        if drain_timeout_s > 1:
            wait_until(lambda: any(s.ended_at is not None for s in load.streams), 120)
            assert all(map(is_alive, processes)), "replicas ended before their streams did"
        load.join()
    assert load.problems == []
    moved = {name: sum(stream.num_resumes > 0 for stream in streams) for name, streams in had.items()}
    assert len(had) == 3 and all(len(streams) >= 5 for streams in had.values())
    assert moved.pop(kept) == 0
    # Given the time, streams end where they are; without it each goes on elsewhere.
    wanted = 0 if drain_timeout_s > 1 else sum(len(streams) for name, streams in had.items() if name != kept)
    assert sum(moved.values()) == wanted
    wait_until(lambda: not any(map(is_alive, processes)), 30)
    counts = ", ".join(f"{len(streams)} on {name}" for name, streams in had.items())
    tell(load, f"{counts}, {kept} kept", f"gone from the directory after {took_s:.1f} s")


def test_replicas_come_and_go_with_the_load(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]]
) -> None:
    addresses = deploy(
        checkpoints,
        num_replicas=1,
        max_replicas=3,
        target_outstanding_tokens=800.0,
        target_time_to_first_token_s=30.0,
        load_look_back_s=4.0,
        upscale_delay_s=0.5,
        downscale_delay_s=3.0,
    )
    with Load(addresses, expected, num_tokens=NUM_TOKENS) as load:
        up_s = wait_until(lambda: len(replicas()) == 3, 90)
        load.more(96)
        several = set(replicas())
        # As many streams as before, of requests so short that one replica bears them.
        load.num_tokens = NUM_SHORT_TOKENS
        running: dict[str, list[Stream]] = {}

        def is_one() -> bool:
            now = [stream for stream in list(load.current) if stream.ended_at is None]
            found = replicas()
            # The streams that a replica had when it was last in the directory.
            running.update({name: [s for s in now if s.replica_id == name] for name in found})
            return len(found) == 1

        down_s = wait_until(is_one, 120)
        load.more(96)
    assert load.problems == []
    assert {stream.replica_id for stream in load.streams} >= several
    left = {name: len(streams) for name, streams in running.items() if name not in replicas()}
    assert len(left) >= 2 and sum(left.values()) > 0, left
    tell(load, f"3 replicas after {up_s:.1f} s, 1 after {down_s:.1f} s", f"those that left had {left} streams")


def test_another_configuration_fails_no_request(checkpoints: tuple[str, str], expected: list[list[int]]) -> None:
    port = 23_900 + os.getpid() % 1000
    # A router on each node, so that each has one on its own to hand its ports to.
    config: dict[str, Any] = {"num_routers": 2, "grpc_port": port, "http_port": port + 1000, "drain_timeout_s": 20.0}
    with local_nodes([2, 2], ["127.0.0.2"]):
        deploy_file(checkpoints, 1, **config)
        addresses = ready(1, 2)
        host = addresses[0].rpartition(":")[0]
        before = overview()
        with HttpLoad(host, port + 1000, expected) as http, Load(addresses, expected, num_tokens=NUM_TOKENS) as load:
            load.more(16)
            began = time.monotonic()
            deploy_file(checkpoints, 1, max_num_requests=24, **config)

            def is_replaced() -> bool:
                try:
                    found = overview()
                except Exception:
                    # The directory is replaced too.
                    return False
                old = [set(before[kind]) & set(found[kind]) for kind in before]
                return not any(old) and all(len(found[kind]) == len(before[kind]) for kind in before)

            wait_until(is_replaced, 120)
            took_s = time.monotonic() - began
            load.more(96)
        assert load.problems == http.problems == []
        assert {stream.replica_id for stream in load.streams} >= set(overview()["replicas"])
        tell(load, f"{http.num_done} over HTTP", f"all replaced after {took_s:.1f} s")


def test_a_node_that_is_gone_loses_no_token(
    nodes: Cluster, checkpoints: tuple[str, str], expected: list[list[int]]
) -> None:
    addresses = deploy(checkpoints, num_replicas=3, num_cpus_per_actor=2.0, max_surge_percent=0)
    hosts = {name: replica["address"].rpartition(":")[0] for name, replica in replicas().items()}
    assert len(set(hosts.values())) == 3, hosts
    router_hosts = {address.rpartition(":")[0] for address in addresses}
    node = next(node for node in nodes.worker_nodes if node.node_ip_address not in router_hosts)
    (victim,) = [name for name, host in hosts.items() if host == node.node_ip_address]
    with Load(addresses, expected, num_tokens=NUM_TOKENS) as load:
        load.more(32)
        wait_until(load.all_run, 30)
        nodes.remove_node(node, allow_graceful=False)
        gone_s = wait_until(lambda: victim not in replicas() and replicas(), 30)
        load.more(64)
        nodes.add_node(num_cpus=2, node_ip_address="127.0.0.9")
        back_s = wait_until(lambda: len(replicas()) == 3, 120)
        load.more(32)
    assert load.problems == []
    assert load.num_resumes > 0
    tell(load, f"noticed after {gone_s:.1f} s", f"three again {back_s:.1f} s behind a new node")
