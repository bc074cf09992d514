"""The whole application on a local Ray: tokens over gRPC equal the local engine's, and a killed process loses none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray import serve

from jetflow_cluster import LLM
from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.rpc.client import JetFlowClient
from support.served import APP, PATHS, PROMPTS, local_tokens, params, settings

pytestmark = pytest.mark.slow

NUM_STREAMS, NUM_TOKENS = 12, 200


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=16,
        include_dashboard=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": PATHS}},
    )
    # Routers have a port of their own; Serve's HTTP proxy is not needed.
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


def deploy(checkpoints: tuple[str, str], **config: Any) -> tuple[JetFlowClient, Any]:
    given = settings(checkpoints, **{"num_pages": 128, "http_port": 0, "drain_timeout_s": 5.0} | config)
    handle = serve.run(build_app(given), name=APP, route_prefix=None)
    client = JetFlowClient(handle.address.remote().result(), timeout_s=60.0)
    deadline = time.monotonic() + 60
    while not client.health():
        assert time.monotonic() < deadline, "the router did not become healthy"
        time.sleep(0.1)
    return client, handle


@pytest.mark.parametrize("num_draft_workers", [0, 1, 2])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4])
def test_tokens_over_grpc_equal_the_local_engines(
    cluster: None, checkpoints: tuple[str, str], tensor_parallel_size: int, num_draft_workers: int
) -> None:
    prompts = [[i + 1, 2 * i % 90 + 5, 7, 40 + i] * (1 + i % 5) for i in range(100)]
    wanted = [(prompt, params(i, 32, temperature)) for i, prompt in enumerate(prompts) for temperature in (0.0, 0.9)]
    llm = LLM(*checkpoints, dtype="float32", num_pages=512, tree_nodes={1: 8})
    expected = llm.generate([prompt for prompt, _ in wanted], [p for _, p in wanted])
    client, handle = deploy(
        checkpoints,
        dtype="float32",
        num_pages=512,
        tensor_parallel_size=tensor_parallel_size,
        num_draft_workers=num_draft_workers,
        draft_placement="dedicated" if num_draft_workers else "colocated",
    )
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda pair: client.generate(*pair), wanted))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.finish_reason for o in found] == [o.finish_reason for o in expected]
    assert [o.text for o in found] == [o.text for o in expected]
    # Requests that force trees get them here as there: a draft worker that fails is no silent end of speculation.
    forced = [p.speculation.mode == "force" for _, p in wanted]
    is_drafted = [o.speculation.num_draft_nodes > 0 for o in found]
    assert all(drafted for drafted, is_forced in zip(is_drafted, forced, strict=True) if is_forced)
    (replica,) = handle.overview.remote().result()["replicas"].values()
    # The replica itself is a process too.
    assert len(set(replica["pids"].values())) == 1 + tensor_parallel_size + num_draft_workers
    client.close()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_shard_that_dies_in_mid_stream_loses_no_token(
    cluster: None, checkpoints: tuple[str, str], signal_number: signal.Signals
) -> None:
    expected = local_tokens(checkpoints, NUM_TOKENS)[:NUM_STREAMS]
    client, handle = deploy(checkpoints, tensor_parallel_size=2, num_replicas=2, step_timeout_s=2.0)
    victim = next(iter(handle.overview.remote().result()["replicas"].values()))

    def run(i: int) -> list[int]:
        tokens: list[int] = []
        for delta in client.stream(PROMPTS[i], params(i, NUM_TOKENS)):
            tokens += delta.token_ids
        return tokens

    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        futures = [threads.submit(run, i) for i in range(NUM_STREAMS)]
        time.sleep(0.5)
        os.kill(victim["pids"]["shard 1"], signal_number)
        found = [future.result(timeout=90) for future in futures]
    assert found == expected
    client.close()
