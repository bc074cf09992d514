"""`jetflow demo`, part scaled: replicas come and go with the load, no request fails, and the dashboard has data."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from tokenizers import Tokenizer

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import DEFAULT_CHECKPOINT, BenchPrompt, load_prompts
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.bench.scrapes import Recorder
from jetflow_cluster.cluster import launch
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.rpc.client import JetFlowClient
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.types import SamplingParams

_LOOK_S, _LOOKS_PER_SCRAPE = 0.5, 4
#: Seconds for a number of replicas to be reached, for each phase's load besides, and for the last values to be told.
_SCALE_TIMEOUT_S, _HOLD_S, _EXPORT_S = 150.0, 8.0, 12.0
_MAX_REPLICAS, _MAX_TOKENS = 3, 96


class RequestsFailedError(RuntimeError):
    """A request of the demonstration failed, or a panel of the dashboard is empty."""


@dataclass(frozen=True, kw_only=True)
class ScaledDemoConfig:
    """Everything that decides a demonstration."""

    #: Where ``results.json``, ``scaled.png`` and ``dashboard.png`` go.
    output_dir: Path
    #: Streams at a time while the load is low, and while it is high.
    num_low: int = 1
    num_high: int = 16
    #: What is served.
    cluster: ClusterConfig = field(
        default_factory=lambda: ClusterConfig(
            num_replicas=1,
            max_replicas=_MAX_REPLICAS,
            target_outstanding_tokens=160.0,
            # Less than the high load, and three times more: requests wait in the router until all replicas are there.
            max_replica_tokens=500,
            target_time_to_first_token_s=10.0,
            load_look_back_s=3.0,
            upscale_delay_s=1.0,
            downscale_delay_s=10.0,
            num_pages=1024,
            num_threads_per_actor=1,
            grpc_port=0,
            http_port=None,
            log_level="warning",
        )
    )


@dataclass
class _Seen:
    """What was seen while it ran; moments by `time.monotonic`."""

    replicas: list[tuple[float, int]] = field(default_factory=list)
    #: End, tokens and seconds of each request.
    requests: list[tuple[float, int, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class _Load:
    """So many streams, one request behind the other each."""

    def __init__(self, client: JetFlowClient, prompts: list[BenchPrompt], seen: _Seen, num_streams: int):
        self._client, self._prompts, self._seen = client, prompts, seen
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(num_streams)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets what runs end."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        number = index
        while not self._stopped.is_set():
            prompt = self._prompts[number % len(self._prompts)]
            number += len(self._threads)
            params = SamplingParams(
                temperature=0.7 * (number % 2), seed=number, max_tokens=_MAX_TOKENS, ignore_eos=True
            )
            began = time.monotonic()
            try:
                output = self._client.generate(prompt.token_ids, params)
            except Exception as error:
                self._seen.failures.append(f"{type(error).__name__}: {error}")
                return
            now = time.monotonic()
            self._seen.requests.append((now, len(output.token_ids), now - began))


def run_scaled_demo(config: ScaledDemoConfig, address: str, console: Console) -> dict[str, Any]:
    """Runs the demonstration against what is served at `address`, and returns the content of ``results.json``.

    Raises:
        RequestsFailedError: a request failed, a number of replicas was not reached, or a panel has no data.
    """
    console.print(Rule("scaled: replicas come and go with the load", style="dim", align="left"))
    recorder, seen = Recorder(launch.metric_addresses()), _Seen()
    tokenizer = Tokenizer.from_file(str(DEFAULT_CHECKPOINT / "target" / "tokenizer.json"))
    prompts = load_prompts(None, tokenizer, max_prompts=24, max_prompt_tokens=96)
    began = time.monotonic()
    with JetFlowClient(address, timeout_s=300.0) as client:
        _run_phases(config, client, prompts, recorder, seen, console)
    return _finish(config, recorder, seen, began, console)


def _run_phases(
    config: ScaledDemoConfig,
    client: JetFlowClient,
    prompts: list[BenchPrompt],
    recorder: Recorder,
    seen: _Seen,
    console: Console,
) -> None:
    stopped = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, recorder, seen, stopped), daemon=True)
    watch.start()
    try:
        low = _Load(client, prompts, seen, config.num_low)
        with console.status("low load on one replica"):
            time.sleep(_HOLD_S)
        high = _Load(client, prompts, seen, config.num_high)
        with console.status(f"{config.num_high} streams more"):
            _wait_for(lambda: _last(seen) == _MAX_REPLICAS, seen, f"{_MAX_REPLICAS} replicas")
            time.sleep(_HOLD_S)
            _end_some_early(client, prompts[0])
        high.stop()
        with console.status("low load again"):
            _wait_for(lambda: _last(seen) == 1, seen, "one replica")
            time.sleep(_EXPORT_S)
        low.stop()
    finally:
        stopped.set()
        watch.join()


def _watch(client: JetFlowClient, recorder: Recorder, seen: _Seen, stopped: threading.Event) -> None:
    looks = itertools.count()
    while not stopped.wait(_LOOK_S):
        with suppress(StatusError):
            loads = client.server_load(timeout_s=5.0).replicas
            count = sum(load.healthy and not load.draining for load in loads)
            seen.replicas.append((time.monotonic(), count))
        if next(looks) % _LOOKS_PER_SCRAPE == 0:
            recorder.scrape()


def _last(seen: _Seen) -> int:
    return seen.replicas[-1][1] if seen.replicas else 0


def _wait_for(holds: Callable[[], bool], seen: _Seen, what: str) -> None:
    deadline = time.monotonic() + _SCALE_TIMEOUT_S
    while not holds() and not seen.failures:
        if time.monotonic() > deadline:
            raise RequestsFailedError(f"{what} did not come within {_SCALE_TIMEOUT_S:.0f} s")
        time.sleep(_LOOK_S)


def _end_some_early(client: JetFlowClient, prompt: BenchPrompt) -> None:
    """Cancels one request, and lets one run out of time: the dashboard tells of them too."""
    params = SamplingParams(max_tokens=512, ignore_eos=True, temperature=0.0)
    with client.stream(prompt.token_ids, params) as stream:
        next(stream)
    with suppress(StatusError):
        client.generate(prompt.token_ids, params, timeout_s=0.05)


def _finish(
    config: ScaledDemoConfig, recorder: Recorder, seen: _Seen, began: float, console: Console
) -> dict[str, Any]:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    counts = [count for _, count in seen.replicas]
    empty = recorder.empty_panels()
    results = {
        "machine": describe_machine(),
        "num_requests": len(seen.requests),
        "num_failed": len(seen.failures),
        "num_tokens": sum(tokens for _, tokens, _ in seen.requests),
        "replicas": {"first": counts[0], "most": max(counts), "last": counts[-1]},
        "seconds_to_most": round(seen.replicas[counts.index(max(counts))][0] - began - _HOLD_S, 1),
        "empty_panels": empty,
    }
    write_json(results, config.output_dir / "results.json")
    _draw(seen, began, config.output_dir / "scaled.png")
    recorder.draw(config.output_dir / "dashboard.png")
    if seen.failures:
        raise RequestsFailedError(f"{len(seen.failures)} requests failed: {seen.failures[0]}")
    if empty:
        raise RequestsFailedError(f"panels of the dashboard without data: {', '.join(empty)}")
    console.print(
        f"[bold green]no request failed:[/bold green] {len(seen.requests)} requests while {counts[0]} replica "
        f"became {max(counts)} and {counts[-1]} again; every panel of the dashboard has data"
    )
    return results


def _draw(seen: _Seen, began: float, path: Path) -> None:
    plt = load_pyplot()
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True)
    top.step([t - began for t, _ in seen.replicas], [n for _, n in seen.replicas], where="post", color="#0b7a75")
    top.set_ylabel("replicas")
    top.set_ylim(0, _MAX_REPLICAS + 0.5)
    moments = sorted((ended - began, tokens) for ended, tokens, _ in seen.requests)
    width = 2.0
    bins = [i * width for i in range(int(moments[-1][0] / width) + 2)]
    middle.hist([t for t, _ in moments], bins=bins, weights=[n / width for _, n in moments], color="#0b7a75", alpha=0.8)
    middle.set_ylabel("tokens/s of\nfinished requests")
    bottom.scatter([t - began for t, _, _ in seen.requests], [s for _, _, s in seen.requests], s=6, color="#0b7a75")
    bottom.set_ylabel("seconds of a request")
    bottom.set_xlabel("seconds")
    top.set_title("replicas, throughput and latency while the load rises and falls", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
