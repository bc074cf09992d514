"""`jetflow bench offline`: decoding speed of this engine and of `transformers`, measured side by side.

All systems complete the same prompts with the same weights in one process. They take turns within each prompt, in an
order that changes from prompt to prompt, so a machine that speeds up or slows down does so for all of them; ratios
are taken within a prompt, and their median is reported. No system reuses anything between prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import BenchPrompt, load_prompts
from jetflow_cluster.bench.rows import Measurement, Run, make_rows
from jetflow_cluster.bench.systems import EngineSystem, System, TransformersSystem, load_transformers
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.types import SpeculationMode, SpeculationOptions

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
#: Fewest batches that a batch size is measured on.
MIN_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class OfflineBenchConfig:
    """Everything that decides a measurement. Raises ValueError naming field, value and limit."""

    #: Target checkpoint; None is the embedded default.
    model: str | None = None
    #: Draft head; None is the embedded one for the embedded default.
    draft_head: str | None = None
    #: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    device: str = "auto"
    #: Compute types, each measured on its own: fp32, bf16, fp16, fp64.
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    #: Requests at a time; 1 measures every system, others the engine and plain `transformers`.
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    #: Prompts at batch size 1.
    num_prompts: int = 40
    #: Output tokens of each prompt.
    max_tokens: int = 96
    #: Longest prompt; longer ones lose their beginning.
    max_prompt_tokens: int = 256
    #: Tree sizes (root included) that are forced at batch size 1.
    budgets: tuple[int, ...] = (8, 16, 32, 64)
    #: Tokens that prompt lookup guesses at a time.
    num_lookup_tokens: int = 10
    #: File of prompts; None is the held-out ones of the embedded default.
    prompts: Path | None = None
    #: Seed of the order of turns.
    seed: int = 0

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in SHORT_DTYPES:
                raise ValueError(f"dtypes = {dtype!r}: must be among {', '.join(SHORT_DTYPES)}")
        for name in ("num_prompts", "max_tokens", "max_prompt_tokens", "num_lookup_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name, low in (("batch_sizes", 1), ("budgets", 2)):
            if any(value < low for value in getattr(self, name)):
                raise ValueError(f"{name} = {list(getattr(self, name))}: each must be at least {low}")
        if not self.dtypes or not self.batch_sizes:
            raise ValueError("dtypes and batch_sizes: at least one of each is needed")


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One group of prompts that all systems of a batch size complete before the next."""

    batch_size: int
    systems: list[System]
    prompts: list[BenchPrompt]


def run_offline(config: OfflineBenchConfig, *, on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Measures and returns the content of ``results.json``.

    Args:
        config: what to measure.
        on_progress: called before each run with a label, the number of runs done, and their total in this dtype.
    """
    machine = describe_machine()
    measurements: list[Measurement] = []
    model: dict[str, Any] = {}
    for dtype in config.dtypes:
        on_progress(f"{dtype}: loading and warming up", 0, 1)
        llm = LLM(
            config.model,
            config.draft_head,
            dtype=SHORT_DTYPES[dtype],
            device=config.device,
            enable_prefix_cache=False,
            max_num_requests=max(config.batch_sizes),
        )
        prompts = load_prompts(
            config.prompts,
            llm.tokenizer,
            max_prompts=config.num_prompts,
            max_prompt_tokens=min(config.max_prompt_tokens, llm.max_model_len - config.max_tokens),
        )
        turns = list(_turns(config, llm, prompts, dtype))
        _warm_up(turns)
        measurements += _measure(config, turns, dtype, on_progress)
        model |= _describe_model(config, llm)
    settings = asdict(config) | {"prompts": str(config.prompts or "held-out prompts of the embedded default")}
    return {
        "machine": machine,
        "model": model,
        "settings": settings,
        "rows": make_rows(measurements),
        "samples": [measurement.as_sample() for measurement in measurements],
    }


def _turns(config: OfflineBenchConfig, llm: LLM, prompts: list[BenchPrompt], dtype: str) -> Iterator[_Turn]:
    frontend = llm.frontend
    model = load_transformers(frontend.target_dir, SHORT_DTYPES[dtype], llm.engine.target.device)
    off = EngineSystem("off", llm, SpeculationOptions(mode=SpeculationMode.OFF))
    plain = TransformersSystem("transformers", model)
    systems: list[System] = [off, plain]
    if llm.engine.drafter is not None:
        systems.insert(1, EngineSystem("auto", llm, SpeculationOptions(mode=SpeculationMode.AUTO)))
    alone: list[System] = [
        *systems,
        TransformersSystem("transformers prompt lookup", model, num_lookup_tokens=config.num_lookup_tokens),
    ]
    if llm.engine.drafter is not None:
        for nodes in config.budgets:
            options = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=nodes)
            alone.append(EngineSystem(f"force {nodes}", llm, options))
    for size in config.batch_sizes:
        num_batches = len(prompts) if size == 1 else max(MIN_BATCHES, -(-len(prompts) // size))
        for i in range(num_batches):
            group = [prompts[(i * size + k) % len(prompts)] for k in range(size)]
            yield _Turn(batch_size=size, systems=alone if size == 1 else systems, prompts=group)


def _warm_up(turns: Sequence[_Turn]) -> None:
    """Runs every system of every batch size once, unmeasured."""
    seen: set[tuple[int, str]] = set()
    for turn in turns:
        for system in turn.systems:
            if (turn.batch_size, system.name) not in seen:
                seen.add((turn.batch_size, system.name))
                system.run([prompt.token_ids for prompt in turn.prompts], 8)


def _measure(
    config: OfflineBenchConfig, turns: Sequence[_Turn], dtype: str, on_progress: Callable[[str, int, int], None]
) -> list[Measurement]:
    total = sum(len(turn.systems) for turn in turns)
    measurements: list[Measurement] = []
    for i, turn in enumerate(turns):
        order = list(turn.systems)
        random.Random(f"{config.seed}/{dtype}/{i}").shuffle(order)
        runs: dict[str, Run] = {}
        for system in order:
            on_progress(f"{dtype}, batch {turn.batch_size}: {system.name}", len(measurements) + len(runs), total)
            runs[system.name] = system.run([prompt.token_ids for prompt in turn.prompts], config.max_tokens)
        measurements += [
            Measurement(
                dtype=dtype,
                batch_size=turn.batch_size,
                system=system.name,
                prompts=tuple(prompt.name for prompt in turn.prompts),
                run=runs[system.name],
                runs=runs,
            )
            for system in turn.systems
        ]
    on_progress(f"{dtype}: done", total, total)
    return measurements


def _describe_model(config: OfflineBenchConfig, llm: LLM) -> dict[str, Any]:
    target, drafter = llm.engine.target.model, llm.engine.drafter
    head = getattr(drafter, "head", None)
    return {
        "target": config.model or "embedded default",
        "draft_head": config.draft_head or ("embedded default" if config.model is None else None),
        "num_target_parameters": sum(p.numel() for p in target.parameters()),
        "num_draft_parameters": sum(p.numel() for p in head.parameters()) if head is not None else 0,
        "has_sidecar": getattr(drafter, "sidecar", None) is not None,
    }
