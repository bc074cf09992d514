"""An engine with random weights in the middle of its work, and the time of each stage of its steps."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch

from jetflow_cluster.bench.step_floors import Point
from jetflow_cluster.bench.timing import synchronize
from jetflow_cluster.cache.page_pool import PagePool
from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.graph_runner import serve_from_graphs
from jetflow_cluster.engine.recording import CudaGraphs
from jetflow_cluster.engine.request import Request, RequestStatus
from jetflow_cluster.engine.scheduler import Scheduler
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.models.draft_head import DraftHead
from jetflow_cluster.models.registry import TargetModel
from jetflow_cluster.types import SamplingParams

STAGES = ("schedule", "draft", "build", "verify", "accept", "commit")


def pages_of(point: Point, page_size: int, num_steps: int, block_size: int) -> int:
    """Pages of one request, with all that some steps write."""
    return -(-(point.prefix_len + num_steps * block_size + 2 * point.num_nodes) // page_size)


def engine_at(
    target: TargetModel, head: DraftHead, point: Point, *, page_size: int, num_steps: int, has_graphs: bool
) -> tuple[Engine, TargetRunner, HeadDrafter]:
    """An engine whose requests have their prefixes in the cache and are about to decode; its steps are recorded where
    there are graphs."""
    num_pages = point.batch_size * pages_of(point, page_size, num_steps, head.config.block_size)
    scratch = int(has_graphs)
    runner = TargetRunner(target, num_pages=num_pages, page_size=page_size, num_scratch_pages=scratch)
    drafter = HeadDrafter(head, None, target, num_pages=num_pages, page_size=page_size, num_scratch_pages=scratch)
    scheduler = Scheduler(
        PagePool(num_pages),
        None,
        max_num_batched_tokens=max(point.num_rows, point.batch_size),
        max_prompt_chunk=None,
        max_num_requests=point.batch_size,
        max_draft_depth=drafter.max_depth,
        num_scratch_rows=drafter.num_scratch_rows,
        needs_draft_context=True,
        budget=FixedBudget(point.num_nodes),
    )
    engine = Engine(runner, drafter, scheduler, prefix_cache=None)
    if has_graphs:
        max_len = point.prefix_len + num_steps * head.config.block_size + 1
        serve_from_graphs(engine, max_len=max_len, recorder=CudaGraphs(runner.device))
    for kv in (runner.kv, drafter.kv):
        kv.normal_()
    generator = torch.Generator().manual_seed(0)
    for i in range(point.batch_size):
        size = (point.prefix_len + 1,)
        request = Request(
            request_id=f"r{i}",
            prompt_token_ids=torch.randint(0, target.config.vocab_size - 1, size, generator=generator).tolist(),
            params=SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True),
            seed=0,
            arrival=i,
            pages=PageTable(scheduler.pool, page_size),
            keys=PageKeys(page_size),
            detokenizer=None,
            eos_token_ids=frozenset(),
            max_len=2**30,
        )
        request.pages.ensure(point.prefix_len + 1)
        request.num_computed = request.draft_len = point.prefix_len
        request.status = RequestStatus.RUNNING
        engine.requests[request.request_id] = request
        scheduler.running.append(request)
    return engine, runner, drafter


def stage_times(engine: Engine, device: torch.device, *, repeats: int, warmups: int = 2) -> dict[str, float]:
    """Median seconds of each stage of the engine's own steps, each waited for, and of steps that are not held up.

    Raises:
        RuntimeError: a request ended, as one does whose step failed.
    """
    marks: list[tuple[str, float]] = []

    def mark(stage: str) -> None:
        synchronize(device)
        marks.append((stage, time.perf_counter()))

    found: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "step")}
    running = len(engine.requests)
    for i in range(warmups + repeats):
        marks.clear()
        engine.on_stage = mark
        engine.step()
        mark("end")
        if i >= warmups:
            for (stage, start), (_, end) in pairwise(marks):
                found[stage].append(end - start)
    engine.on_stage = lambda stage: None
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        engine.step()
        synchronize(device)
        found["step"].append(time.perf_counter() - start)
    if len(engine.requests) < running:
        raise RuntimeError(f"{running - len(engine.requests)} of {running} requests ended while steps were timed")
    # Recorded steps have no stage of building.
    return {stage: statistics.median(times) for stage, times in found.items() if times}
