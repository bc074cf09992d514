"""`jetflow bench stack`: throughput through the whole stack against the engine alone, on the same machine."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import load_prompts
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.cluster import launch
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

MODES = (SpeculationMode.OFF, SpeculationMode.AUTO)


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """Everything that decides a measurement."""

    #: Where ``results.json`` and ``serve.png`` go.
    output_dir: Path
    #: Target checkpoint; None is the embedded default.
    model: str | None = None
    #: Draft head; None is the embedded one for the embedded default.
    draft_head: str | None = None
    dtype: str = "float32"
    #: Requests at a time.
    num_concurrent: int = 8
    #: Groups of prompts; each is completed by both systems in turns.
    num_rounds: int = 5
    #: Prompts of a group for each request at a time: as one ends, the next begins.
    num_per_stream: int = 3
    max_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One group of prompts completed by one system."""

    num_tokens: int
    took_s: float
    #: CPU seconds by process.
    cpu_s: dict[str, float]
    token_ids: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.took_s


def run_serve_bench(config: ServeBenchConfig, console: Console) -> dict[str, Any]:
    """Measures, writes ``results.json`` and the picture, and returns the former's content."""
    with console.status("loading the engine to compare with"):
        llm = LLM(
            config.model,
            config.draft_head,
            dtype=config.dtype,
            enable_prefix_cache=False,
            max_num_requests=config.num_concurrent,
        )
        num_prompts = config.num_concurrent * config.num_per_stream * config.num_rounds
        found = load_prompts(None, llm.tokenizer, max_prompts=num_prompts, max_prompt_tokens=128)
    prompts = [prompt.token_ids for prompt in found]
    groups = [prompts[i :: config.num_rounds] for i in range(config.num_rounds)]
    runs: dict[tuple[SpeculationMode, str], list[_Run]] = {(m, s): [] for m in MODES for s in ("engine", "served")}
    with served(config, console) as (address, pids):
        for mode in MODES:
            _through_stack(address, pids, groups[0], _params(config, mode), config.num_concurrent)
            _engine_alone(llm, groups[0], _params(config, mode))
        for i, group in enumerate(track(groups, "measuring", console=console, transient=True)):
            for mode in MODES:
                params = _params(config, mode)
                systems = ("engine", "served") if i % 2 else ("served", "engine")
                for system in systems:
                    run = (
                        _engine_alone(llm, group, params)
                        if system == "engine"
                        else _through_stack(address, pids, group, params, config.num_concurrent)
                    )
                    runs[mode, system].append(run)
    results = {
        "machine": describe_machine(),
        "model": config.model or "embedded default",
        "dtype": config.dtype,
        "num_concurrent": config.num_concurrent,
        "num_rounds": config.num_rounds,
        "num_per_stream": config.num_per_stream,
        "max_tokens": config.max_tokens,
        "rows": [_row(mode, runs[mode, "engine"], runs[mode, "served"]) for mode in MODES],
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(results, config.output_dir / "results.json")
    _draw(results, config.output_dir / "serve.png")
    return results


def _params(config: ServeBenchConfig, mode: SpeculationMode) -> SamplingParams:
    options = SpeculationOptions(mode=mode)
    return SamplingParams(temperature=0.0, max_tokens=config.max_tokens, ignore_eos=True, speculation=options)


@contextmanager
def served(config: ServeBenchConfig, console: Console) -> Iterator[tuple[str, dict[str, int]]]:
    """A whole stack on this machine: the router's address, and the processes by name."""
    cluster = ClusterConfig(
        model=config.model,
        draft_head=config.draft_head,
        dtype=config.dtype,
        grpc_port=0,
        http_port=None,
        enable_prefix_cache=False,
    )
    launch.connect(None, cluster, log_to_driver=False)
    try:
        with console.status("starting Ray, a replica, a router"):
            address = launch.deploy(cluster)
        pids = {"client": os.getpid()}
        for members in launch.overview().values():
            for member in members.values():
                pids |= member["pids"]
        yield address, pids
    finally:
        launch.shut_down()


def _engine_alone(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> _Run:
    began = time.perf_counter()
    outputs = llm.generate(list(prompts), params)
    took_s = time.perf_counter() - began
    token_ids = [output.token_ids for output in outputs]
    return _Run(num_tokens=sum(map(len, token_ids)), took_s=took_s, cpu_s={}, token_ids=token_ids)


async def _read_all(
    address: str, prompts: Sequence[list[int]], params: SamplingParams, num_concurrent: int
) -> list[list[int]]:
    """The tokens of each prompt, so many streamed at a time."""
    room = asyncio.Semaphore(num_concurrent)
    async with AsyncJetFlowClient(address, timeout_s=300.0) as client:

        async def read(prompt: list[int]) -> list[int]:
            async with room:
                return [token async for delta in client.stream(prompt, params) for token in delta.token_ids]

        return await asyncio.gather(*(read(prompt) for prompt in prompts))


def _through_stack(
    address: str, pids: dict[str, int], prompts: Sequence[list[int]], params: SamplingParams, num_concurrent: int
) -> _Run:
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    idle_before = _all_cpu_s()
    began = time.perf_counter()
    token_ids = asyncio.run(_read_all(address, prompts, params, num_concurrent))
    took_s = time.perf_counter() - began
    cpu_s = {name: _cpu_s(pid) - before[name] for name, pid in pids.items()}
    cpu_s["everything else"] = max(0.0, _all_cpu_s() - idle_before - sum(cpu_s.values()))
    return _Run(num_tokens=sum(map(len, token_ids)), took_s=took_s, cpu_s=cpu_s, token_ids=token_ids)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process, from the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _all_cpu_s() -> float:
    """CPU seconds that were not idle, of all processors."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _row(mode: SpeculationMode, engine: Sequence[_Run], served: Sequence[_Run]) -> dict[str, Any]:
    num_tokens = sum(run.num_tokens for run in served)
    return {
        "name": f"served, {mode.value}",
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in served), 2),
        "engine_tokens_per_s": round(statistics.median(run.tokens_per_s for run in engine), 2),
        "ratio_to_engine": round(
            statistics.median(s.tokens_per_s / e.tokens_per_s for s, e in zip(served, engine, strict=True)), 4
        ),
        "num_different_outputs": sum(
            s != e for a, b in zip(served, engine, strict=True) for s, e in zip(a.token_ids, b.token_ids, strict=True)
        ),
        "cpu_ms_per_token": {
            name: round(1e3 * sum(run.cpu_s[name] for run in served) / num_tokens, 3) for name in served[0].cpu_s
        },
    }


def _draw(results: dict[str, Any], path: Path) -> None:
    plt = load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    rows = results["rows"]
    places = range(len(rows))
    left.bar([p - 0.19 for p in places], [row["engine_tokens_per_s"] for row in rows], 0.36, color="#9aa5b1")
    bars = left.bar([p + 0.19 for p in places], [row["tokens_per_s"] for row in rows], 0.36, color="#0b7a75")
    left.bar_label(bars, labels=[f"{row['ratio_to_engine']:.2f}" for row in rows], fontsize=8)
    left.set_xticks(list(places), [row["name"] for row in rows])
    title = f"tokens/s, {results['num_concurrent']} at a time: engine alone (grey), whole stack (green)"
    left.set_title(title, loc="left", fontsize=9)
    start = [0.0] * len(rows)
    for name in rows[0]["cpu_ms_per_token"]:
        widths = [row["cpu_ms_per_token"][name] for row in rows]
        right.barh([row["name"] for row in rows], widths, left=start, label=name)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set_title("CPU milliseconds per token, by process", loc="left", fontsize=9)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
