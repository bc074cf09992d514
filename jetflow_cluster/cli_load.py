"""``jetflow bench``: load, serve, ramp, trace and simulate: many requests at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jetflow_cluster import cli_options as opt
from jetflow_cluster.console import stderr, stdout

Output = Annotated[Path, typer.Option(help="Folder for results.json and the picture.")]
Concurrency = Annotated[str, typer.Option(help="Requests at a time, by comma; each is measured on its own.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; in each, all modes complete the same requests.")]
Modes = Annotated[str, typer.Option(help="auto, off, or a fixed number of nodes per tree, by comma.")]
PromptLengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, by comma, mixed in every round.")]
OutputLengths = Annotated[str, typer.Option(help="Output lengths in tokens, by comma, mixed in every round.")]
#: Requests of few lengths would end in step with each other, and only without speculation.
UNEVEN_LENGTHS = "33,41,50,58,67,75,84,92"
Add = Annotated[bool, typer.Option(help="Keep what results.json has of other loads.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Begin no further turn behind so many seconds.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts, arrivals and turns.")]


def load(
    output: Output,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    concurrency: Concurrency = "1,2,4,8,16,32,64",
    num_rounds: Rounds = 10,
    modes: Modes = "off,auto,8,16,32,64",
    transformers_at: Annotated[str, typer.Option(help="Batch sizes of transformers, by comma.")] = "",
    prompt_lengths: PromptLengths = "32,64,128",
    output_lengths: OutputLengths = UNEVEN_LENGTHS,
    requests_per_stream: Annotated[int, typer.Option(min=1, help="Requests of a round for each at a time.")] = 3,
    random_head: Annotated[
        bool, typer.Option("--random-head", help="Measure with a head of that shape whose weights are random.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Compute type.")] = "float32",
    draft_workers: Annotated[
        int, typer.Option(min=0, help="Dedicated draft workers; one and two cohorts are then compared.")
    ] = 0,
    max_seconds: MaxSeconds = None,
    add: Add = False,
    seed: Seed = 0,
) -> None:
    """Measure the engine alone under load: modes of speculation, interleaved, with bounds."""
    from jetflow_cluster.bench.load.bench import LoadBenchConfig, run_engine_load
    from jetflow_cluster.bench.load.rounds import LoadPlan

    plan = LoadPlan(
        concurrencies=opt.read_numbers("concurrency", concurrency),
        num_rounds=num_rounds,
        num_requests=requests_per_stream,
        prompt_lengths=opt.read_numbers("prompt_lengths", prompt_lengths),
        output_lengths=opt.read_numbers("output_lengths", output_lengths),
        seed=seed,
    )
    config = LoadBenchConfig(
        output_dir=output,
        plan=plan,
        modes=_words(modes),
        model=model,
        draft_head=draft_head,
        random_head=random_head,
        dtype=dtype,
        transformers_at=opt.read_numbers("transformers_at", transformers_at) if transformers_at else (),
        num_draft_workers=draft_workers,
        max_s=max_seconds,
        add=add,
    )
    run_engine_load(config, stderr)
    stdout.print(f"wrote results.json, load.md and load.png in {output}")


def serve(
    output: Output,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    loop: Annotated[str, typer.Option(help="closed, poisson, or trace (a recorded burst of arrivals).")] = "closed",
    concurrency: Concurrency = "1,2,4,8,16,32,64",
    rates: Annotated[str, typer.Option(help="Requests per second of the open loops, by comma.")] = "",
    num_rounds: Rounds = 10,
    modes: Modes = "off,auto,8,16,32,64",
    prompt_lengths: PromptLengths = "32,64,128",
    output_lengths: OutputLengths = UNEVEN_LENGTHS,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of a round: per stream (closed), or in all.")] = 2,
    server: Annotated[str | None, typer.Option(help="host:port of a running server; else one is started.")] = None,
    openai: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server to measure beside.")] = None,
    openai_model: Annotated[str, typer.Option(help="Name of its model.")] = "",
    openai_options: Annotated[str, typer.Option(help="Further fields of its requests, as a JSON object.")] = "{}",
    trace: Annotated[Path | None, typer.Option(help="Trace of arrivals; see `jetflow bench trace`.")] = None,
    max_seconds: MaxSeconds = None,
    add: Add = False,
    seed: Seed = 0,
) -> None:
    """Measure a server under load: modes of speculation, interleaved, with bounds; closed and open loops."""
    from jetflow_cluster.bench.load.arrivals import BURSTY_TRACE
    from jetflow_cluster.bench.load.bench import LoadBenchConfig, run_served_load
    from jetflow_cluster.bench.load.rounds import LoadPlan

    plan = LoadPlan(
        loop=loop,
        concurrencies=opt.read_numbers("concurrency", concurrency),
        rates=opt.read_floats("rates", rates),
        num_rounds=num_rounds,
        num_requests=num_requests,
        prompt_lengths=opt.read_numbers("prompt_lengths", prompt_lengths),
        output_lengths=opt.read_numbers("output_lengths", output_lengths),
        seed=seed,
    )
    options = json.loads(openai_options)
    if not isinstance(options, dict):
        raise ValueError(f"openai_options = {openai_options!r}: must be a JSON object")
    config = LoadBenchConfig(
        output_dir=output,
        plan=plan,
        modes=_words(modes),
        model=model,
        draft_head=draft_head,
        server=server,
        openai=openai,
        openai_model=openai_model,
        openai_options=options,
        trace=trace or BURSTY_TRACE,
        max_s=max_seconds,
        add=add,
    )
    run_served_load(config, stderr)
    stdout.print(f"wrote results.json, load.md and load.png in {output}")


def trace(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    num_arrivals: Annotated[int, typer.Option(min=2)] = 256,
    burst_factor: Annotated[float, typer.Option(min=1.0, help="Rate in a burst over the one in between.")] = 8.0,
    seed: Seed = 20_261_125,
) -> None:
    """Write a trace of bursty arrivals: a Poisson process that jumps between two rates."""
    from jetflow_cluster.bench.load.arrivals import BurstProcess, write_trace

    process = BurstProcess(num_arrivals=num_arrivals, burst_factor=burst_factor, seed=seed)
    write_trace(process, output)
    stdout.print(f"wrote {output}: {num_arrivals} arrivals")


def simulate(
    output: Annotated[Path, typer.Option(help="Folder for the page; its pictures and results.json lie below it.")],
) -> None:
    """Predict the curves of Qwen3-8B on 1, 2 and 4 H200 from published figures, as a page. Measures nothing."""
    from jetflow_cluster.bench.load.simulated_page import write_simulation

    for row in write_simulation(output)["rows"]:
        where = row["crossing"] or f"more than {row['points'][-1]['num_requests']}"
        stdout.print(f"{row['name']}: speculation stops to pay at {where} requests")
    stdout.print(f"wrote {output / 'simulated-qwen3-8b.md'}")


def ramp(
    output: Output,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    levels: Annotated[str, typer.Option(help="Requests at a time on the way up.")] = "1,2,4,6,8,12,16,24,32,48,64",
    level_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each.")] = 4.0,
    costs: Annotated[Path | None, typer.Option(help="File of a cost model; else this machine is measured.")] = None,
    live: Annotated[bool, typer.Option(help="Run the engine itself, with a live table.")] = False,
    seed: Seed = 0,
) -> None:
    """Let the load rise and fall across the point where speculation stops to pay.

    On a virtual clock with measured costs: the engine's scheduler and policy, synthetic guesses. It is judged against
    `off` in windows of 2 seconds.
    """
    from jetflow_cluster.bench.load.ramp import RampProfile
    from jetflow_cluster.bench.load.ramp_bench import RampBenchConfig, run_live_ramp, run_ramp_bench

    config = RampBenchConfig(
        output_dir=output,
        profile=RampProfile(levels=opt.read_numbers("levels", levels), level_s=level_seconds),
        costs=costs,
        model=model,
        draft_head=draft_head,
        seeds=(seed, seed + 1, seed + 2),
    )
    if live:
        run_live_ramp(config, stdout)
        stdout.print(f"wrote {output / 'live.json'}")
        return
    for row in run_ramp_bench(config, stderr)["rows"]:
        verdict = "holds" if row["holds"] else "DOES NOT HOLD"
        stdout.print(
            f"{row['name']}: worst window {row['worst_ratio_to_off']:.2f} of off, {row['num_turns']} turns: {verdict}"
        )
    stdout.print(f"wrote {output / 'results.json'} and {output / 'ramp.png'}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
