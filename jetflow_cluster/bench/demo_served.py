"""`jetflow demo`, parts served and lost: streams through a local cluster, and a shard lost in the middle of them."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import BenchPrompt, load_prompts
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.cluster import launch
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.rpc.client import JetFlowClient
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

#: Exact: in fp32 shards sum in another order than one process does, and near-ties could part.
_DTYPE = "float64"
#: Of all tokens, the share that has come when the shard is killed.
_KILL_AT = 0.3
_REFRESH_S = 0.2
_REPLACED_TIMEOUT_S = 300.0


class TokensLostError(RuntimeError):
    """A stream did not deliver the tokens that the local engine makes."""


class UnplannedLossError(RuntimeError):
    """A process was lost that the demonstration did not end."""


@dataclass(frozen=True, kw_only=True)
class ServedDemoConfig:
    """Everything that decides a demonstration."""

    #: Where ``results.json`` and ``streams.png`` go.
    output_dir: Path
    #: Concurrent streams; every other one is sampled.
    num_streams: int = 8
    #: Output tokens of each.
    max_tokens: int = 96
    #: What is served. Two replicas, so that one survives.
    cluster: ClusterConfig = field(
        default_factory=lambda: ClusterConfig(
            dtype=_DTYPE,
            tensor_parallel_size=2,
            draft_placement="dedicated",
            num_draft_workers=1,
            num_replicas=2,
            num_pages=1024,
            grpc_port=0,
            http_port=None,
        )
    )


@dataclass
class Stream:
    """One request as its client sees it."""

    prompt: BenchPrompt
    params: SamplingParams
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    #: Seconds of `time.monotonic` of each delta, and the tokens that had come by then.
    moments: list[tuple[float, int]] = field(default_factory=list)
    replica_id: str = ""
    num_resumes: int = 0
    is_done: bool = False

    def longest_gap(self, since: float) -> float:
        """Longest wait for a delta that ended after a moment, in seconds."""
        times = [moment for moment, _ in self.moments]
        return max((b - a for a, b in pairwise(times) if b > since), default=0.0)


@dataclass
class Loss:
    """The shard that is killed."""

    replica_id: str = ""
    pid: int = 0
    killed_at: float = 0.0
    replaced_s: float | None = None


def expected_streams(config: ServedDemoConfig, console: Console) -> list[Stream]:
    """The requests of these parts, with the tokens that this process makes of them, token by token."""
    cluster = config.cluster
    with console.status("completing the prompts in this process, token by token, to compare with"):
        llm = LLM(
            cluster.model, cluster.draft_head, dtype=cluster.dtype, num_pages=cluster.num_pages, tree_nodes={1: 1}
        )
        prompts = load_prompts(None, llm.tokenizer, max_prompts=config.num_streams, max_prompt_tokens=128)
        params = [
            SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=config.max_tokens, ignore_eos=True)
            for i in range(len(prompts))
        ]
        plain = SpeculationOptions(mode=SpeculationMode.OFF)
        outputs = llm.generate(
            [prompt.token_ids for prompt in prompts], [dataclasses.replace(p, speculation=plain) for p in params]
        )
    return [
        Stream(prompt=prompt, params=p, expected=output.token_ids)
        for prompt, p, output in zip(prompts, params, outputs, strict=True)
    ]


def run_served_demo(
    config: ServedDemoConfig, address: str, streams: Sequence[Stream], console: Console, *, kills: bool
) -> dict[str, Any]:
    """Runs the streams, and with `kills` kills a shard in the middle of them; returns the content of ``results.json``.

    Args:
        config: of the demonstration; `output_dir` is this part's.
        address: of the router of what is served.
        streams: of `expected_streams`.
        console: where it is shown.
        kills: whether a shard is killed.

    Raises:
        TokensLostError: a stream's tokens are not those of the local engine.
        UnplannedLossError: a process is gone that the demonstration did not end.
    """
    title = "lost: a shard is killed in mid-stream" if kills else "served: Ray actors and a gRPC router"
    console.print(Rule(title, style="dim", align="left"))
    streams = [dataclasses.replace(stream, tokens=[], moments=[]) for stream in streams]
    before, loss, began = launch.overview(), Loss(), time.monotonic()
    with JetFlowClient(address, timeout_s=300.0) as client:
        _run_all(config, client, streams, loss if kills else None, console)
    _check_processes(before, loss)
    if loss.pid and loss.replaced_s is None:
        raise UnplannedLossError(f"replica {loss.replica_id} was not replaced within {_REPLACED_TIMEOUT_S:.0f} s")
    results = _results(config, streams, loss, began)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(results, config.output_dir / "results.json")
    _draw(streams, loss, began, config.output_dir / "streams.png")
    wrong = [stream.prompt.name for stream in streams if stream.tokens != stream.expected]
    if wrong:
        raise TokensLostError(f"tokens differ from the local engine's: {', '.join(wrong)}")
    console.print(_summary(results))
    return results


def _run_all(
    config: ServedDemoConfig, client: JetFlowClient, streams: Sequence[Stream], loss: Loss | None, console: Console
) -> None:
    # What others print goes elsewhere, and so must not be taken for lines above the table.
    with (
        Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live,
        ThreadPoolExecutor(len(streams) + 1) as threads,
    ):
        runs = [threads.submit(_run, client, stream) for stream in streams]
        shown, replaced = loss or Loss(), threading.Event()
        while not all(run.done() for run in runs) or (shown.pid and not replaced.is_set()):
            if loss is not None and not loss.pid and _share(streams) >= _KILL_AT:
                _kill(loss, streams)
                threads.submit(_watch, loss, config.cluster, replaced)
            live.update(_view(streams, shown), refresh=True)
            time.sleep(_REFRESH_S)
        for run in runs:
            run.result()
        live.update(_view(streams, shown), refresh=True)


def _check_processes(before: dict[str, Any], loss: Loss) -> None:
    """Ray's own words on lost processes go to a file, so what nobody planned is looked for here."""
    after = launch.overview()
    for kind in ("replicas", "routers"):
        for name, member in before[kind].items():
            if name != loss.replica_id and after[kind].get(name, {}).get("pids") != member["pids"]:
                raise UnplannedLossError(
                    f"a process of {kind.removesuffix('s')} {name} is gone: it was {member['pids']}"
                )


def _run(client: JetFlowClient, stream: Stream) -> None:
    with client.stream(stream.prompt.token_ids, stream.params) as deltas:
        for delta in deltas:
            stream.tokens += delta.token_ids
            stream.moments.append((time.monotonic(), len(stream.tokens)))
            if not stream.replica_id and deltas.started is not None:
                stream.replica_id = deltas.started.replica_id
        finished = deltas.finished
        stream.num_resumes = (finished.num_resumes if finished is not None else 0) + deltas.num_calls - 1
    stream.is_done = True


def _share(streams: Sequence[Stream]) -> float:
    return sum(len(stream.tokens) for stream in streams) / sum(len(stream.expected) for stream in streams)


def _kill(loss: Loss, streams: Sequence[Stream]) -> None:
    """Kills a shard of the replica that has most of the running streams."""
    replicas = launch.overview()["replicas"]
    running = [stream.replica_id for stream in streams if not stream.is_done]
    loss.replica_id = max(replicas, key=running.count)
    loss.pid = replicas[loss.replica_id]["pids"]["shard 1"]
    loss.killed_at = time.monotonic()
    os.kill(loss.pid, signal.SIGKILL)


def _watch(loss: Loss, config: ClusterConfig, replaced: threading.Event) -> None:
    """Waits until there are as many replicas as before."""
    try:
        while time.monotonic() - loss.killed_at < _REPLACED_TIMEOUT_S:
            replicas = launch.overview()["replicas"]
            if loss.replica_id not in replicas and len(replicas) == config.num_replicas:
                loss.replaced_s = time.monotonic() - loss.killed_at
                return
            time.sleep(_REFRESH_S)
    finally:
        replaced.set()


def _view(streams: Sequence[Stream], loss: Loss) -> Group:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("prompt", "sampling", "first on", "tokens", "resumed", "state"):
        table.add_column(title, justify="right" if title in ("tokens", "resumed") else "left", no_wrap=True)
    for stream in streams:
        is_same = stream.tokens == stream.expected[: len(stream.tokens)]
        state = Text("identical" if stream.is_done else "streaming", style="green" if stream.is_done else "")
        if not is_same:
            state = Text("DIFFERENT", style="bold red")
        table.add_row(
            stream.prompt.name[-28:],
            "greedy" if stream.params.is_greedy else f"T = {stream.params.temperature:g}",
            Text(stream.replica_id, style="red" if stream.replica_id == loss.replica_id else ""),
            f"{len(stream.tokens)}/{len(stream.expected)}",
            str(stream.num_resumes) if stream.is_done else "",
            state,
        )
    event = Text("")
    if loss.pid:
        event = Text(f"shard 1 of {loss.replica_id}, process {loss.pid}, was killed; ", style="bold red")
        ago_s = time.monotonic() - loss.killed_at
        event.append(
            f"replaced and warm again after {loss.replaced_s:.1f} s"
            if loss.replaced_s is not None
            else f"its replacement starts ({ago_s:.0f} s)",
            style="bold green" if loss.replaced_s is not None else "yellow",
        )
    return Group(table, event, Text(""))


def _results(config: ServedDemoConfig, streams: Sequence[Stream], loss: Loss, began: float) -> dict[str, Any]:
    ended = max(stream.moments[-1][0] for stream in streams)
    return {
        "machine": describe_machine(),
        "dtype": config.cluster.dtype,
        "num_streams": len(streams),
        "num_tokens": sum(len(stream.tokens) for stream in streams),
        "num_different": sum(stream.tokens != stream.expected for stream in streams),
        "num_resumed": sum(stream.num_resumes > 0 for stream in streams),
        "tokens_per_s": round(sum(len(stream.tokens) for stream in streams) / (ended - began), 2),
        "killed_replica": loss.replica_id,
        "longest_gap_s": round(max(stream.longest_gap(loss.killed_at or began) for stream in streams), 3),
        "replaced_s": None if loss.replaced_s is None else round(loss.replaced_s, 2),
    }


def _summary(results: dict[str, Any]) -> str:
    if not results["killed_replica"]:
        return (
            f"[bold green]outputs identical:[/bold green] {results['num_tokens']} tokens of {results['num_streams']} "
            f"streams equal the local engine's; {results['tokens_per_s']:.0f} tokens/s"
        )
    return (
        f"[bold green]no token lost:[/bold green] {results['num_tokens']} tokens of {results['num_streams']} streams "
        f"equal the local engine's, {results['num_resumed']} streams went on elsewhere; longest wait after the kill "
        f"{results['longest_gap_s']:.2f} s; the replica was replaced after {results['replaced_s']} s"
    )


def _draw(streams: Sequence[Stream], loss: Loss, began: float, path: Path) -> None:
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for stream in streams:
        colour = "#c0392b" if stream.num_resumes else "#0b7a75"
        times, counts = zip(*stream.moments, strict=True)
        axes.step([t - began for t in times], counts, where="post", color=colour, linewidth=1.2, alpha=0.8)
    if loss.pid:
        at = loss.killed_at - began
        axes.axvline(at, color="black", linestyle="--", linewidth=1)
        axes.annotate("shard killed", (at, 0), xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens delivered")
    axes.set_title("streams that went on elsewhere (red) and undisturbed ones (green)", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
