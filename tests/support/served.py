"""An application served on nodes of a local Ray, and load on it whose tokens are known."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.cluster.ray_options import RAY_ENVIRONMENT
from jetflow_cluster.rpc.client import JetFlowClient

APP = "test"
ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
NUM_STREAMS = 32
PROMPTS = [[i + 1, 2 * i + 5, 7, 40 + i] * (1 + i % 5) for i in range(NUM_STREAMS)]

Overview = dict[str, dict[str, dict[str, Any]]]


def params(i: int, num_tokens: int, temperature: float | None = None) -> SamplingParams:
    """Of the i-th stream: greedy and sampled by turns if nothing else is said, in one of the three modes."""
    mode = ("auto", "force", "off")[i % 3]
    return SamplingParams(
        max_tokens=num_tokens,
        seed=i,
        temperature=0.9 * (i % 2) if temperature is None else temperature,
        ignore_eos=True,
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=8 if mode == "force" else None),
    )


def local_tokens(checkpoints: tuple[str, str], num_tokens: int) -> list[list[int]]:
    """What each stream has to give, by an engine in this process."""
    llm = LLM(*checkpoints, dtype="float64", num_pages=2048, tree_nodes={1: 8})
    outputs = llm.generate(PROMPTS, [params(i, num_tokens) for i in range(NUM_STREAMS)])
    return [output.token_ids for output in outputs]


def settings(checkpoints: tuple[str, str], **config: Any) -> dict[str, Any]:
    """Arguments of `build_app` for a small model in fp64, with ports that are free."""
    model, head = checkpoints
    given = {"model": model, "draft_head": head, "dtype": "float64", "num_pages": 512, "num_threads_per_actor": 1}
    return given | {"grpc_port": 0, "http_port": None} | config


@contextmanager
def local_nodes(
    num_cpus: Sequence[int], addresses: Sequence[str | None], *, head_variables: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """Nodes of this machine, the head first, with Serve on them.

    Args:
        num_cpus: of each node, as Ray counts them.
        addresses: of each node but the head; None is the machine's own.
        head_variables: environment of the head's processes.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", PATHS)
        head = {"num_cpus": num_cpus[0], "include_dashboard": False, "env_vars": head_variables or {}}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for count, address in zip(num_cpus[1:], addresses, strict=True):
            cluster.add_node(num_cpus=count, **({} if address is None else {"node_ip_address": address}))
        ray.init(address=cluster.address, configure_logging=False, runtime_env={"env_vars": {"PYTHONPATH": PATHS}})
        serve.start(proxy_location="Disabled")
        try:
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def deploy_file(checkpoints: tuple[str, str], num_replicas: int, **config: Any) -> None:
    """As ``serve deploy`` does with a file that says how many replicas there are beside the application's arguments."""
    application = {
        "name": APP,
        "route_prefix": None,
        "import_path": "jetflow_cluster.cluster.app:build_app",
        "args": settings(checkpoints, **config),
        "deployments": [{"name": "EngineReplica", "num_replicas": num_replicas}],
    }
    schema = ServeDeploySchema.model_validate({"proxy_location": "Disabled", "applications": [application]})
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)


def overview() -> Overview:
    """What all replicas and routers tell of themselves."""
    found: Overview = serve.get_deployment_handle("Directory", APP).overview.remote().result(timeout_s=20)
    return found


def replicas() -> dict[str, dict[str, Any]]:
    """The replicas of `overview`; none while nobody answers."""
    try:
        return overview()["replicas"]
    except Exception:
        return {}


def wait_until(holds: Callable[[], Any], limit_s: float) -> float:
    """Waits for a condition; returns the seconds that it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, f"{holds.__name__} did not hold within {limit_s:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - began


@dataclass
class Stream:
    """What one client saw of one request. Moments are those of `time.monotonic`."""

    index: int
    tokens: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    #: Where it began.
    replica_id: str = ""
    #: Replicas and routers that took it over.
    num_resumes: int = 0
    ended_at: float | None = None

    def longest_gap(self, since: float) -> float:
        """Longest wait for a delta that ended after a moment."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return max((after - before for before, after in pairs if after > since), default=0.0)


class Load:
    """Streams beside each other, each compared with what it has to be.

    Args:
        addresses: of the routers.
        expected: tokens of each stream, by the local engine.
        num_rounds: requests of each stream, one behind the other; None goes on until the context is left.
        num_tokens: of each request, at most as many as are expected; may be changed while it runs.
    """

    def __init__(
        self,
        addresses: list[str],
        expected: list[list[int]],
        *,
        num_rounds: int | None = None,
        num_tokens: int | None = None,
    ):
        self.num_tokens = len(expected[0]) if num_tokens is None else num_tokens
        #: All requests in the order in which they began, and the last one of each stream.
        self.streams: list[Stream] = []
        self.current = [Stream(i) for i in range(NUM_STREAMS)]
        self.num_done = 0
        self.problems: list[str] = []
        self._expected, self._num_rounds = expected, num_rounds
        self._client = JetFlowClient(addresses, timeout_s=180.0)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_STREAMS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()
        self._client.close()

    def join(self) -> None:
        """Waits for the rounds of all streams."""
        for thread in self._threads:
            thread.join()

    def all_run(self) -> bool:
        """Whether each stream has delivered and has not ended."""
        return all(stream.moments and stream.ended_at is None for stream in list(self.current))

    def more(self, count: int, limit_s: float = 60.0) -> None:
        """Waits until so many further requests were served."""
        wanted = self.num_done + count
        wait_until(lambda: self.num_done >= wanted or bool(self.problems), limit_s)
        assert not self.problems, self.problems[:3]

    @property
    def num_resumes(self) -> int:
        """Times that a replica or router took a request over."""
        return sum(stream.num_resumes for stream in self.streams)

    def _run(self, i: int) -> None:
        num_rounds = 0
        while not self._stopped.is_set() and not self.problems and num_rounds != self._num_rounds:
            num_rounds += 1
            stream, count = Stream(i), self.num_tokens
            with self._lock:
                self.streams.append(stream)
                self.current[i] = stream
            problem = self._read(stream, count)
            with self._lock:
                self.num_done += 1
                if problem:
                    self.problems.append(f"{i}: {problem}")

    def _read(self, stream: Stream, count: int) -> str:
        """Reads one request to its end; returns what was wrong with it."""
        try:
            with self._client.stream(PROMPTS[stream.index], params(stream.index, count)) as deltas:
                for delta in deltas:
                    assert deltas.started is not None
                    stream.replica_id = stream.replica_id or deltas.started.replica_id
                    stream.tokens += delta.token_ids
                    stream.moments.append(time.monotonic())
            assert deltas.finished is not None
            stream.num_resumes = deltas.finished.num_resumes + deltas.num_calls - 1
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            stream.ended_at = time.monotonic()
        wanted = self._expected[stream.index][:count]
        return "" if stream.tokens == wanted else f"{stream.tokens} is not {wanted}"
