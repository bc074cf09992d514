"""``jetflow bench``: router, step, stack and start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jetflow_cluster import cli_options as opt
from jetflow_cluster.console import stderr, stdout

Output = Annotated[Path, typer.Option(help="Folder for results.json and the picture.")]


def router(
    output: Output,
    num_pairs: Annotated[int, typer.Option(min=20, help="Requests sent both ways, for the latency.")] = 300,
    num_streams: Annotated[str, typer.Option(help="Concurrent streams, by comma, for the throughput.")] = "1,8,32,128",
    num_deltas: Annotated[int, typer.Option(min=128, help="Deltas of each measurement.")] = 20_000,
) -> None:
    """Measure what a router adds to a call, and how many deltas it passes on per second and core.

    The replica behind it is synthetic: it speaks the protocol and computes nothing.
    """
    from jetflow_cluster.bench.router import RouterBenchConfig, run_router_bench

    streams = opt.read_numbers("num_streams", num_streams)
    config = RouterBenchConfig(output_dir=output, num_pairs=num_pairs, num_streams=streams, num_deltas=num_deltas)
    results = run_router_bench(config, stderr)
    latency = results["latency"]
    stdout.print(f"first delta: {latency['added_ms']:.2f} ms added to {latency['direct_ms']:.2f} ms (median)")
    for row in results["rows"]:
        per_core, used = row["deltas_per_s_and_core"], row["cpu_us_per_delta"]
        stdout.print(f"{row['name']}: {per_core:,} deltas per second and core ({used:.0f} CPU microseconds each)")
    stdout.print(f"wrote {output / 'results.json'} and {output / 'router.png'}")


def stack(
    output: Output,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    num_concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    num_rounds: Annotated[int, typer.Option(min=1, help="Groups of prompts.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each prompt.")] = 128,
) -> None:
    """Compare the whole stack (client, router, replica, Ray) with the engine alone, on this machine in one run."""
    from jetflow_cluster.bench.serve import ServeBenchConfig, run_serve_bench

    config = ServeBenchConfig(
        output_dir=output,
        model=model,
        draft_head=draft_head,
        num_concurrent=num_concurrent,
        num_rounds=num_rounds,
        max_tokens=max_tokens,
    )
    for row in run_serve_bench(config, stderr)["rows"]:
        stdout.print(
            f"{row['name']}: {row['tokens_per_s']:.0f} tokens/s, {row['ratio_to_engine']:.2f} of the engine alone; "
            f"CPU ms per token: {', '.join(f'{name} {ms:.2f}' for name, ms in row['cpu_ms_per_token'].items())}"
        )
    stdout.print(f"wrote {output / 'results.json'} and {output / 'serve.png'}")


def start(
    output: Output,
    num_rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 2,
    before: Annotated[Path | None, typer.Option(help="Another checkout, whose starts are measured as well.")] = None,
) -> None:
    """Measure how long a server takes to start, by phase, beside an empty application with as many actors.

    A first start has nothing measured and nothing compiled; a second one finds what the first one kept.
    """
    from jetflow_cluster.bench.start import StartBenchConfig, run_start_bench, start_table

    config = StartBenchConfig(output_dir=output, num_rounds=num_rounds, before=before)
    stdout.print(start_table(run_start_bench(config, stderr)["rows"]))
    stdout.print(f"wrote {output / 'results.json'} and {output / 'start.png'}")


def step(
    output: Output,
    shape: Annotated[
        str, typer.Option(help="tiny, qwen3-0.6b, qwen3-4b, qwen3-8b, qwen3-14b or qwen3-32b.")
    ] = "qwen3-8b",
    batch_sizes: Annotated[str, typer.Option(help="Requests at a time, by comma.")] = "1,8",
    num_nodes: Annotated[str, typer.Option(help="Nodes of each tree, by comma; 1 is no speculation.")] = "1,32,128",
    prefix_lens: Annotated[str, typer.Option(help="Tokens in the cache of each request, by comma.")] = "1024",
    dtype: opt.ComputeType = opt.DType.AUTO,
    device: opt.Device = "auto",
    page_size: Annotated[int, typer.Option(min=1, help="KV slots per page.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Steps that count, per figure.")] = 20,
    floor_only: Annotated[
        bool, typer.Option("--floor-only", help="Bytes and floors alone, for any shape; needs --bandwidth-gbps.")
    ] = False,
    bandwidth_gbps: Annotated[
        float | None, typer.Option(help="Gigabytes per second of the floors; measured where not given.")
    ] = None,
) -> None:
    """Measure every stage of one step with random weights, beside the time that memory alone would take."""
    import torch

    from jetflow_cluster.bench.step import StepBenchConfig, run_step_bench
    from jetflow_cluster.bench.step_report import step_table
    from jetflow_cluster.config import EngineConfig
    from jetflow_cluster.engine.resolve import compute_device, compute_dtype

    engine = EngineConfig(dtype=dtype.value, device=device)
    # Floors need no device: they may be those of another machine.
    where = torch.device(device) if floor_only and device != "auto" else compute_device(engine)
    config = StepBenchConfig(
        output_dir=output,
        shape=shape,
        batch_sizes=opt.read_numbers("batch_sizes", batch_sizes),
        num_nodes=opt.read_numbers("num_nodes", num_nodes),
        prefix_lens=opt.read_numbers("prefix_lens", prefix_lens),
        dtype=compute_dtype(engine, where) or torch.bfloat16,
        device=where,
        page_size=page_size,
        repeats=repeats,
        floor_only=floor_only,
        bandwidth=bandwidth_gbps * 1e9 if bandwidth_gbps is not None else None,
    )
    results = run_step_bench(config, stderr)
    stdout.print(step_table(results["rows"]))
    stdout.print(f"wrote {output / 'results.json'} and {output / 'step.png'}")
