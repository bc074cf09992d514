"""The whole application on a local Ray: tokens over gRPC equal the local engine's, and a killed process loses none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.cluster.app import build_app
from jetflow_cluster.rpc.client import JetFlowClient
from support.small_models import write_head, write_target

pytestmark = pytest.mark.slow

PROMPTS = [[i + 1, 2 * i + 5, 7, 40 + i] * (1 + i % 5) for i in range(12)]


def params(i: int, temperature: float, max_tokens: int = 32) -> SamplingParams:
    mode = ("auto", "force", "off")[i % 3]
    return SamplingParams(
        max_tokens=max_tokens,
        seed=i,
        temperature=temperature,
        ignore_eos=True,
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=8 if mode == "force" else None),
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, head = (tmp_path_factory.mktemp(name) for name in ("target", "head"))
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    return str(target), str(head)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    paths = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in (".", "kernels", "tests"))
    ray.init(
        num_cpus=16,
        include_dashboard=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    # Routers have a port of their own; Serve's HTTP proxy is not needed.
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


def deploy(checkpoints: tuple[str, str], **config: Any) -> tuple[JetFlowClient, Any]:
    model, head = checkpoints
    app = build_app(
        {"model": model, "draft_head": head, "dtype": "float64", "num_pages": 128, "grpc_port": 0, "http_port": 0}
        | {"num_threads_per_actor": 1, "drain_timeout_s": 5.0}
        | config
    )
    handle = serve.run(app, name="test", route_prefix=None)
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
    wanted = [(prompt, params(i, temperature)) for i, prompt in enumerate(prompts) for temperature in (0.0, 0.9)]
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
    llm = LLM(*checkpoints, dtype="float64", num_pages=128, tree_nodes={1: 8})
    expected = [
        o.token_ids for o in llm.generate(PROMPTS, [params(i, 0.9 * (i % 2), 200) for i in range(len(PROMPTS))])
    ]
    client, handle = deploy(checkpoints, tensor_parallel_size=2, num_replicas=2, step_timeout_s=2.0)
    victim = next(iter(handle.overview.remote().result()["replicas"].values()))

    def run(i: int) -> list[int]:
        tokens: list[int] = []
        for delta in client.stream(PROMPTS[i], params(i, 0.9 * (i % 2), 200)):
            tokens += delta.token_ids
        return tokens

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        futures = [threads.submit(run, i) for i in range(len(PROMPTS))]
        time.sleep(0.5)
        os.kill(victim["pids"]["shard 1"], signal_number)
        found = [future.result(timeout=90) for future in futures]
    assert found == expected
    client.close()
