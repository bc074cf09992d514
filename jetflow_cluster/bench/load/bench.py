"""`jetflow bench load` and `jetflow bench serve`: modes of speculation under load, in one interleaved run."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from jetflow_cluster.bench.load.arrivals import BURSTY_TRACE, read_trace
from jetflow_cluster.bench.load.draft_workers import draft_workers
from jetflow_cluster.bench.load.random_head import write_random_head
from jetflow_cluster.bench.load.report import draw_load, load_table, markdown_table
from jetflow_cluster.bench.load.rounds import LoadPlan, measure
from jetflow_cluster.bench.load.rows import make_rows
from jetflow_cluster.bench.load.systems import (
    CohortLoad,
    EngineLoad,
    GrpcLoad,
    LoadSystem,
    OpenAiLoad,
    TransformersLoad,
)
from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import DEFAULT_CHECKPOINT, load_prompts
from jetflow_cluster.bench.report import write_json
from jetflow_cluster.bench.systems import load_transformers
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.models.hub import checkpoints

_NUM_PROMPTS = 200
#: Nodes of the trees with which one and two cohorts are compared.
_COHORT_NODES = 8


@dataclass(frozen=True, kw_only=True)
class LoadBenchConfig:
    """Everything that decides a measurement. Raises ValueError naming field, value and limit."""

    #: Where ``results.json``, ``load.md`` and ``load.png`` go.
    output_dir: Path
    plan: LoadPlan = field(default_factory=LoadPlan)
    #: Settings of speculation: ``auto``, ``off``, or a fixed number of nodes.
    modes: tuple[str, ...] = ("off", "auto", "8", "16", "32", "64")
    model: str | None = None
    draft_head: str | None = None
    #: Measure with a head of that shape whose weights are random (in the process only).
    random_head: bool = False
    dtype: str = "float32"
    #: Batch sizes that `transformers` is measured at (in the process only).
    transformers_at: tuple[int, ...] = ()
    #: ``host:port`` of a running server; None starts one (over gRPC only).
    server: str | None = None
    #: An OpenAI-compatible endpoint that is measured beside, its model, and fields of its requests.
    openai: str | None = None
    openai_model: str = ""
    openai_options: dict[str, Any] = field(default_factory=dict)
    #: Dedicated draft workers of the engine in this process; with some, one and two cohorts are measured too.
    num_draft_workers: int = 0
    #: File of prompts; None is the held-out ones of the embedded default.
    prompts: Path | None = None
    #: A recorded trace for the loop ``trace``.
    trace: Path = BURSTY_TRACE
    #: Seconds behind which no further turn begins; None is no limit.
    max_s: float | None = None
    #: Keep the samples that ``results.json`` has of other loads.
    add: bool = False

    def __post_init__(self) -> None:
        if self.transformers_at and len(self.plan.output_lengths) > 1:
            raise ValueError(f"output_lengths = {self.plan.output_lengths}: transformers needs one length")
        if self.transformers_at and "off" not in self.modes:
            raise ValueError(f"modes = {self.modes}: transformers is compared with `off`, which must be among them")


def run_engine_load(config: LoadBenchConfig, console: Console) -> dict[str, Any]:
    """The engine in this process; writes the files and returns ``results.json``.

    Raises:
        ValueError: an open loop, which needs a server, or a random head of no shape.
    """
    plan = config.plan
    if plan.loop != "closed":
        raise ValueError(f"loop = {plan.loop!r}: the engine alone is measured in a closed loop")
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "enable_prefix_cache": False,
        "max_num_requests": max(plan.concurrencies),
    }
    with ExitStack() as stack:
        with console.status("loading and warming up"):
            draft_head, factory = _draft_head(config, stack), None
            if config.num_draft_workers:
                engine_config = EngineConfig(model=config.model, draft_head=draft_head, **options)
                factory = stack.enter_context(draft_workers(engine_config, config.num_draft_workers))
            llm = LLM(config.model, draft_head, drafter_factory=factory, **options)
            systems: list[LoadSystem] = [EngineLoad(mode, llm) for mode in _reference_first(config.modes)]
            if config.num_draft_workers:
                systems += [CohortLoad(_COHORT_NODES, num, llm) for num in (1, 2)]
            if config.transformers_at:
                model = load_transformers(llm.frontend.target_dir, config.dtype, llm.engine.target.device)
                systems.append(TransformersLoad(model))

        def runs_at(system: LoadSystem, level: float) -> bool:
            return system.name != "transformers" or int(level) in config.transformers_at

        # As a replica does before it serves: the collector need not look at what stays and hold a step up.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        where = f"engine, {config.num_draft_workers} draft workers" if config.num_draft_workers else "engine alone"
        where += ", random head" if config.random_head else ""
        return _measure_and_write(config, systems, llm.tokenizer, where, runs_at, console)


def _draft_head(config: LoadBenchConfig, stack: ExitStack) -> str | None:
    """The head that is measured; a random one is there for as long as the stack."""
    if not config.random_head:
        return config.draft_head
    _, like = checkpoints(EngineConfig(model=config.model, draft_head=config.draft_head))
    if like is None:
        raise ValueError("draft_head = None: a random head needs one whose shape it takes")
    folder = stack.enter_context(TemporaryDirectory())
    write_random_head(like, Path(folder))
    return folder


def run_served_load(config: LoadBenchConfig, console: Console) -> dict[str, Any]:
    """Servers over their APIs; writes the files and returns ``results.json``.

    Raises:
        ValueError: what only the engine in the process can be measured with.
    """
    for name in ("random_head", "transformers_at", "num_draft_workers"):
        if getattr(config, name):
            raise ValueError(f"{name} = {getattr(config, name)}: not over a network, only for the engine alone")
    tokenizer = Tokenizer.from_file(str(Path(config.model or DEFAULT_CHECKPOINT / "target") / "tokenizer.json"))
    others: list[LoadSystem] = []
    if config.openai is not None:
        key = os.environ.get("OPENAI_API_KEY")
        others.append(OpenAiLoad("openai", config.openai, config.openai_model, key, config.openai_options))
    modes = _reference_first(config.modes)
    if config.server is not None or not modes:
        ours: list[LoadSystem] = [GrpcLoad(mode, config.server) for mode in modes if config.server is not None]
        return _measure_and_write(config, [*ours, *others], tokenizer, "served", _always, console)
    # Ray is loaded only where it is needed.
    from jetflow_cluster.bench.serve import ServeBenchConfig, served

    stack = ServeBenchConfig(
        output_dir=config.output_dir, model=config.model, draft_head=config.draft_head, dtype=config.dtype
    )
    with served(stack, console) as (address, _):
        ours = [GrpcLoad(mode, address) for mode in modes]
        return _measure_and_write(config, [*ours, *others], tokenizer, "served", _always, console)


def _always(system: LoadSystem, level: float) -> bool:
    return True


def _reference_first(modes: Sequence[str]) -> list[str]:
    """Outputs are compared with those without speculation."""
    return sorted(dict.fromkeys(modes), key=lambda mode: mode != "off")


def _measure_and_write(
    config: LoadBenchConfig,
    systems: Sequence[LoadSystem],
    tokenizer: Tokenizer,
    where: str,
    runs_at: Callable[[LoadSystem, float], bool],
    console: Console,
) -> dict[str, Any]:
    prompts = load_prompts(
        config.prompts, tokenizer, max_prompts=_NUM_PROMPTS, max_prompt_tokens=max(config.plan.prompt_lengths)
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("")
        samples = measure(
            config.plan,
            systems,
            prompts,
            trace=read_trace(config.trace),
            runs_at=runs_at,
            max_s=config.max_s,
            on_progress=lambda label, done, total: progress.update(
                task, description=label, completed=done, total=total
            ),
        )
    path = config.output_dir / "results.json"
    runs = [_described(config)]
    if config.add and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["where"] != where:
            raise ValueError(
                f"output_dir = {config.output_dir}: holds a measurement of another kind ({earlier['where']})"
            )
        measured = {(s["loop"], s["level"]) for s in samples}
        samples = [s for s in earlier["samples"] if (s["loop"], s["level"]) not in measured] + samples
        runs = [*earlier["runs"], *runs]
    rows = make_rows(samples)
    results = {
        "machine": describe_machine(),
        "model": config.model or "embedded default",
        "where": where,
        "runs": runs,
        "rows": rows,
        "samples": samples,
    }
    write_json(results, path)
    (config.output_dir / "load.md").write_text(markdown_table(rows), encoding="utf-8")
    title = f"{results['model']}, {where}, {config.dtype}, greedy"
    draw_load(rows, title, config.output_dir / "load.png")
    console.print(load_table(rows))
    return results


def _described(config: LoadBenchConfig) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    # Where results are written is no part of them, and a trace is known by its name.
    described.pop("output_dir")
    return described | {"trace": config.trace.name} | {"load_average": os.getloadavg()[0]}
