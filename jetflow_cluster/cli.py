"""The ``jetflow`` command. Commands import what they need when they run, so that help appears at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jetflow_cluster import __version__, cli_bench, cli_load, cli_remote, cli_serving, cli_training
from jetflow_cluster import cli_options as opt
from jetflow_cluster.console import Commands, apply_environment, print_json, stderr, stdout
from jetflow_cluster.env import read_environment
from jetflow_cluster.types import (
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationOptions,
)

if TYPE_CHECKING:
    from jetflow_cluster import LLM
    from jetflow_cluster.bench.terminal import Streamed

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Several tokens per pass of a large language model, and not one of them changed.\n\n"
    "A small draft head proposes a tree of continuations, the model checks all of it in one pass, and what it would "
    "have written itself is kept. Without [bold]--model[/bold], every command uses the small model that comes with "
    "the package.",
    epilog='Start with:  [bold]jetflow demo[/bold]  or  [bold]jetflow generate "def fibonacci(n):" --stats[/bold]',
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")


def _show_version(value: bool) -> None:
    if value:
        stdout.print(f"jetflow {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    apply_environment(read_environment())


@app.command(
    epilog='Examples:\n\n  jetflow generate "def quicksort(items):" --max-tokens 64 --stats\n\n'
    "  jetflow generate --file prompt.txt --temperature 0.7 --seed 1 --json\n\n"
    '  cat module.py | jetflow generate --stop "\\n\\n"\n\n'
    '  jetflow generate "import os" --server localhost:9000'
)
def generate(
    prompt: opt.PromptText = None,
    file: opt.PromptFile = None,
    server: opt.Server = None,
    token: opt.Token = None,
    ca_cert: opt.CaCert = None,
    client_cert: opt.ClientCert = None,
    client_key: opt.ClientKey = None,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    dtype: opt.ComputeType = opt.DType.AUTO,
    device: opt.Device = "auto",
    max_model_len: opt.MaxModelLen = None,
    chat: opt.Chat = False,
    max_tokens: opt.MaxTokens = 128,
    min_tokens: opt.MinTokens = 0,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    stop_token_id: opt.StopTokenId = None,
    ignore_eos: opt.IgnoreEos = False,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    presence_penalty: opt.PresencePenalty = 0.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    logit_bias: opt.LogitBias = None,
    logprobs: opt.Logprobs = None,
    speculation: opt.Speculation = SpeculationMode.AUTO,
    max_tree_nodes: opt.MaxTreeNodes = None,
    max_depth: opt.MaxDepth = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Colour guessed tokens; tell speed and acceptance.")] = False,
) -> None:
    """Complete a prompt; text streams as it is made."""
    opt.check_shown(logprobs, as_json=as_json)
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=opt.read_stops(stop),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=opt.read_biases(logit_bias),
        logprobs=logprobs,
        speculation=SpeculationOptions(mode=speculation, max_tree_nodes=max_tree_nodes, max_depth=max_depth),
    )
    text = opt.read_prompt(prompt, file)
    access = cli_remote.Access(token=token, ca_cert=ca_cert, client_cert=client_cert, client_key=client_key)
    engine = {"draft_head": draft_head, "dtype": dtype.value, "device": device, "max_model_len": max_model_len}
    with _opened(server, access, model, engine, speculation) as llm:
        _complete(llm, text, params, chat=chat, as_json=as_json, stats=stats)


@contextmanager
def _opened(
    server: str | None, access: cli_remote.Access, model: str | None, engine: dict[str, Any], mode: SpeculationMode
) -> Iterator[LLM | cli_remote.RemoteLLM]:
    """The engine of a server, or one in this process."""
    access.check_used(server)
    if server is None:
        yield _load(model, mode=mode, **engine)
    else:
        with cli_remote.connect(server, model, engine, access) as remote:
            yield remote


def _complete(
    llm: LLM | cli_remote.RemoteLLM, text: str, params: SamplingParams, *, chat: bool, as_json: bool, stats: bool
) -> None:
    asked: str | list[int] = llm.apply_chat_template([{"role": "user", "content": text}]) if chat else text
    if as_json:
        print_json(_output_object(llm.generate([asked], params)[0]))
        return
    from jetflow_cluster.bench.terminal import stream_to

    streamed = stream_to(stdout, llm, asked, params, coloured=stats)
    stdout.print()
    if stats:
        _print_stats(streamed)


def _load(model: str | None, draft_head: str | None, *, mode: SpeculationMode, **options: Any) -> LLM:
    """An engine for one request at a time; it measures what trees pay only where the answer is needed."""
    from jetflow_cluster import LLM

    table = None if mode is SpeculationMode.AUTO else {1: 1}
    with stderr.status("loading the model"):
        return LLM(model, draft_head, max_num_requests=1, tree_nodes=table, **options)


def _output_object(output: RequestOutput) -> dict[str, Any]:
    speculation = dataclasses.asdict(output.speculation)
    speculation["mean_acceptance_length"] = output.speculation.mean_acceptance_length
    found: dict[str, Any] = {
        "request_id": output.request_id,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "matched_stop": output.matched_stop,
        "prompt_token_ids": output.prompt_token_ids,
        "seed": output.seed,
        "usage": dataclasses.asdict(output.usage),
        "speculation": speculation,
    }
    if output.logprobs is not None:
        found["logprobs"] = [dataclasses.asdict(entry) for entry in output.logprobs]
    return found


def _print_stats(streamed: Streamed) -> None:
    stderr.print(
        f"[dim]{len(streamed.token_ids)} tokens in {streamed.num_steps} passes, {streamed.tokens_per_s:.0f} tokens/s, "
        f"{streamed.mean_acceptance_length:.2f} tokens per pass;[/dim] "
        f"[green]{sum(streamed.accepted_per_step)} guessed[/green] [dim]by the draft head; "
        f"ended by {streamed.finish_reason}[/dim]"
    )


@app.command(epilog="Examples:\n\n  jetflow demo --output out/demo\n\n  jetflow demo --part speed --part served")
def demo(
    part: Annotated[
        list[opt.DemoPart] | None, typer.Option(help="One part; may be given several times.", show_default="all")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for figures and pictures.")] = Path("out/demo"),
    prompts: opt.PromptSet = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 6,
    max_tokens: opt.MaxTokens = 96,
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    device: opt.Device = "auto",
) -> None:
    """See what speculation gives: the same outputs, faster; then served, with a shard lost, and scaled.

    Parts: speed completes held-out code token by token and with trees, live, and proves the outputs identical; served
    does so on a local Ray, two replicas of two shards and a draft worker; lost kills a shard in mid-stream; scaled lets
    replicas come and go with the load. Model, prompts and device are those of speed.
    """
    from jetflow_cluster.bench.demo import DemoConfig
    from jetflow_cluster.bench.demo_parts import PARTS, run_parts

    config = DemoConfig(
        output_dir=output,
        prompts=prompts,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        model=model,
        draft_head=draft_head,
        device=device,
    )
    for path in run_parts([each.value for each in part] if part else PARTS, config, stdout):
        stdout.print(f"wrote {path}", highlight=False)


@app.command(epilog='Example:\n\n  jetflow trace "def read_config(path):" --max-tree-nodes 32 --output trees.html')
def trace(
    prompt: opt.PromptText = None,
    file: opt.PromptFile = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("trees.html"),
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    dtype: opt.ComputeType = opt.DType.AUTO,
    device: opt.Device = "auto",
    max_tokens: opt.MaxTokens = 64,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = None,
    speculation: opt.Speculation = SpeculationMode.FORCE,
    max_tree_nodes: opt.MaxTreeNodes = None,
    max_depth: opt.MaxDepth = None,
) -> None:
    """Draw a request's trees step by step: what was guessed, how likely, and what was kept."""
    options = SpeculationOptions(mode=speculation, max_tree_nodes=max_tree_nodes, max_depth=max_depth)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, speculation=options)
    text = opt.read_prompt(prompt, file)
    llm = _load(model, draft_head, mode=speculation, dtype=dtype.value, device=device)

    from jetflow_cluster.bench.trace import record_trace, trace_page

    record = record_trace(llm, text, params)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(trace_page(record), encoding="utf-8")
    stdout.print(f"wrote {output}: {len(record.steps)} steps, {len(record.output.token_ids)} tokens")


@bench_app.callback()
def _bench() -> None:
    """Measure speed on this machine."""


@bench_app.command(
    epilog="Examples:\n\n  jetflow bench offline --output out/bench\n\n"
    "  jetflow bench offline --output out/quick --dtype fp32 --batch-sizes 1 --num-prompts 8"
)
def offline(
    output: Annotated[Path, typer.Option(help="Folder for results.json and the picture.")],
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    device: opt.Device = "auto",
    dtype: Annotated[str, typer.Option(help="Compute types, by comma: fp32, bf16, fp16, fp64.")] = "fp32,bf16",
    batch_sizes: Annotated[str, typer.Option(help="Requests at a time, by comma.")] = "1,8,32",
    budgets: Annotated[str, typer.Option(help="Tree sizes to force at batch size 1, by comma.")] = "8,16,32,64",
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each prompt.")] = 96,
    prompts: opt.PromptSet = None,
) -> None:
    """Compare this engine with and without speculation, and transformers, on the same weights and prompts.

    All systems take turns on each prompt in a changing order; medians of ratios within a prompt are reported.
    """
    from jetflow_cluster.bench.offline import OfflineBenchConfig, run_offline
    from jetflow_cluster.bench.report import draw_offline, rows_table, write_json

    config = OfflineBenchConfig(
        model=model,
        draft_head=draft_head,
        device=device,
        dtypes=tuple(part.strip() for part in dtype.split(",")),
        batch_sizes=opt.read_numbers("batch_sizes", batch_sizes),
        budgets=opt.read_numbers("budgets", budgets),
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        prompts=prompts,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("starting")

        def show(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total)

        results = run_offline(config, on_progress=show)
    write_json(results, output / "results.json")
    draw_offline(results, output / "results.png")
    stdout.print(rows_table(results["rows"]))
    stdout.print(f"wrote {output / 'results.json'} and {output / 'results.png'}")


bench_app.command("router", epilog="Example:\n\n  jetflow bench router --output out/router")(cli_bench.router)
bench_app.command(
    "step", epilog="Example:\n\n  jetflow bench step --shape qwen3-8b --num-nodes 1,128 --output out/step"
)(cli_bench.step)
bench_app.command("stack", epilog="Example:\n\n  jetflow bench stack --output out/stack")(cli_bench.stack)
bench_app.command("start", epilog="Example:\n\n  jetflow bench start --output out/start")(cli_bench.start)
bench_app.command("load", epilog="Example:\n\n  jetflow bench load --output out/load")(cli_load.load)
bench_app.command("serve", epilog="Example:\n\n  jetflow bench serve --output out/serve --concurrency 1,8")(
    cli_load.serve
)
bench_app.command("trace", epilog="Example:\n\n  jetflow bench trace --output trace.json")(cli_load.trace)
bench_app.command("ramp", epilog="Example:\n\n  jetflow bench ramp --output out/ramp")(cli_load.ramp)
bench_app.command("simulate", epilog="Example:\n\n  jetflow bench simulate --output docs")(cli_load.simulate)


def _doctor_costs(
    model: str | None,
    draft_head: str | None,
    dtype: str,
    device: str,
    max_model_len: int | None,
    output: Path,
    *,
    as_json: bool,
) -> None:
    from jetflow_cluster.bench.costs import draw_costs, examine_costs, print_costs
    from jetflow_cluster.engine.local import LLM

    llm = LLM(model, draft_head, dtype=dtype, device=device, max_model_len=max_model_len)
    report = examine_costs(llm)
    draw_costs(report, output / "costs.png")
    if as_json:
        print_json(report)
    else:
        print_costs(report, stdout)
        stdout.print(f"picture in {output / 'costs.png'}")


@app.command()
def doctor(
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    dtype: opt.ComputeType = opt.DType.AUTO,
    device: opt.Device = "auto",
    max_model_len: opt.MaxModelLen = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Load the model and measure what its steps cost and guesses are worth.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the picture of --costs.")] = Path("out/costs"),
    as_json: opt.AsJson = False,
) -> None:
    """Tell versions, devices, the embedded model, what would run here, and what memory it would take."""
    if costs:
        _doctor_costs(model, draft_head, dtype.value, device, max_model_len, output, as_json=as_json)
        return
    from jetflow_cluster.bench.doctor import examine, print_report
    from jetflow_cluster.config import EngineConfig

    report = examine(
        EngineConfig(
            model=model,
            draft_head=draft_head,
            dtype=dtype.value,
            device=device,
            max_model_len=max_model_len,
        )
    )
    if as_json:
        print_json(report)
    else:
        print_report(report, stdout)


app.command(epilog=cli_training.DISTILL_EXAMPLES)(cli_training.distill)
app.command(epilog=cli_training.EVALUATE_EXAMPLES)(cli_training.evaluate_head)
app.command(epilog=cli_serving.SERVE_EXAMPLES)(cli_serving.serve)
app.command(epilog="Example:\n\n  jetflow timeline --seconds 5 --output timeline.json")(cli_serving.timeline)
