"""`jetflow bench step`: what one step costs on this device, beside the time that memory alone would take."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.report import write_json
from jetflow_cluster.bench.step_engine import engine_at, pages_of, stage_times
from jetflow_cluster.bench.step_floors import ModelBytes, Point, floor_rows, row_of
from jetflow_cluster.bench.step_parts import part_times
from jetflow_cluster.bench.step_report import draw_steps
from jetflow_cluster.bench.step_shapes import Shape, random_models
from jetflow_cluster.bench.timing import copy_bandwidth
from jetflow_cluster.cache.free_memory import available_memory_bytes

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
_STEPS_PER_REPEAT = 2
_WARMUPS = 2


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """What is measured. Raises ValueError for what cannot be."""

    output_dir: Path
    device: torch.device
    #: One of `step_shapes.SHAPES`.
    shape: str = "qwen3-8b"
    batch_sizes: tuple[int, ...] = (1, 8)
    #: Nodes of each tree, root included; 1 is no speculation.
    num_nodes: tuple[int, ...] = (1, 32, 128)
    prefix_lens: tuple[int, ...] = (1024,)
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    #: Steps that count.
    repeats: int = 20
    #: Print bytes and floors alone; nothing is allocated.
    floor_only: bool = False
    #: Bytes per second; None measures a copy.
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "num_nodes", "prefix_lens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} = {values}: must be numbers from 1")
        if max(self.num_nodes) > 512:
            raise ValueError(f"num_nodes = {max(self.num_nodes)}: must be at most 512")
        if self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats}: must be at least 1")
        if self.bandwidth is not None and not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth = {self.bandwidth}: must be above 0")
        if self.floor_only and self.bandwidth is None:
            raise ValueError("floor_only needs a bandwidth: nothing is measured")

    @property
    def points(self) -> list[Point]:
        """All steps."""
        return [
            Point(batch_size=batch, num_nodes=nodes, prefix_len=prefix)
            for prefix in self.prefix_lens
            for batch in self.batch_sizes
            for nodes in self.num_nodes
        ]


def run_step_bench(config: StepBenchConfig, console: Console) -> dict[str, Any]:
    """Measures, and writes ``results.json`` and ``step.png``; points that do not fit into memory are named there."""
    shape = Shape.of(config.shape)
    sizes = ModelBytes.of(shape, config.dtype, config.device)
    skipped: list[str] = []
    bandwidth = config.bandwidth or copy_bandwidth(config.device, _COPY_BYTES[config.device.type])
    if config.floor_only:
        rows = floor_rows(sizes, config.points, bandwidth)
    else:
        rows = _measure(config, shape, sizes, bandwidth, skipped, console)
    results = {
        "machine": describe_machine(),
        "model": {"shape": config.shape, "dtype": str(config.dtype).removeprefix("torch."), "weights": "random"},
        "settings": {
            "device": str(config.device),
            "page_size": config.page_size,
            "repeats": config.repeats,
            "bandwidth_bytes_per_s": bandwidth,
            "is_bandwidth_measured": config.bandwidth is None,
            "floor_only": config.floor_only,
        },
        "skipped": skipped,
        "rows": rows,
    }
    write_json(results, config.output_dir / "results.json")
    draw_steps(results, config.output_dir / "step.png")
    return results


def _measure(
    config: StepBenchConfig,
    shape: Shape,
    sizes: ModelBytes,
    bandwidth: float,
    skipped: list[str],
    console: Console,
) -> list[dict[str, object]]:
    weights = sizes.target + 2 * sizes.lm_head + sizes.head
    # Layouts for the CPU are a second copy.
    weights *= 2 if config.device.type == "cpu" else 1
    available = available_memory_bytes(config.device)
    if weights > available:
        raise ValueError(f"shape = {config.shape}: weights of {weights} bytes do not fit, {available} are free")
    target, head = random_models(shape, config.dtype, config.device)
    rows: list[dict[str, object]] = []
    is_cuda = config.device.type == "cuda"
    for point in config.points:
        console.print(f"batch {point.batch_size}, {point.num_nodes} nodes, prefix {point.prefix_len}", highlight=False)
        needed = _kv_bytes(config, sizes, point) + 2 * point.num_rows * sizes.vocab_size * max(4, sizes.logit)
        free = available_memory_bytes(config.device)
        if needed > free:
            skipped.append(
                f"batch {point.batch_size}, {point.num_nodes} nodes, prefix {point.prefix_len}: needs {needed} bytes "
                f"beside the weights, {free} are free"
            )
            console.print(f"  left out: {skipped[-1]}", highlight=False)
            continue
        num_steps = 2 * (_STEPS_PER_REPEAT * config.repeats + _WARMUPS)
        engine, runner, drafter = engine_at(
            target, head, point, page_size=config.page_size, num_steps=num_steps, has_graphs=is_cuda
        )
        parts = part_times(engine, runner, drafter, point, repeats=config.repeats)
        if is_cuda:
            # First from graphs, where only the whole step can be timed; then launch by launch.
            parts["step from graphs"] = stage_times(engine, config.device, repeats=config.repeats, warmups=3)["step"]
            engine.compute = engine.compute_eagerly
        times = stage_times(engine, config.device, repeats=config.repeats, warmups=_WARMUPS)
        bytes_of = sizes.stages(point) | {"step": sizes.step(point), "schedule": 0}
        for name, seconds in (times | parts).items():
            if name == "draft" and point.num_nodes == 1:
                continue
            part = next((part for part in ("attention", "step") if name.startswith(part)), name)
            rows.append(row_of(point, name, bytes_of[part], bandwidth, seconds))
        del engine, runner, drafter
        # An engine refers to itself, and what the allocator holds on to is not free.
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
    return rows


def _kv_bytes(config: StepBenchConfig, sizes: ModelBytes, point: Point) -> int:
    num_steps = 2 * (_STEPS_PER_REPEAT * config.repeats + _WARMUPS)
    pages = point.batch_size * pages_of(point, config.page_size, num_steps, sizes.max_depth + 1)
    return pages * config.page_size * (sizes.target_kv + sizes.draft_kv)
