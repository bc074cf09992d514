"""Measures, before an engine serves, what its steps cost and what its trees are worth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from jetflow_cluster.engine.budget import BudgetTable
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.protocols import FixedBudget, StepRecord
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

_log = logging.getLogger(__name__)

RUNNING = (1, 2, 4, 8, 16, 32)
NODES = (1, 8, 16, 24, 32, 48, 64)
#: Rows of a step that warm-up measures at most; larger ones never pay on a device where these do not.
MAX_ROWS = 512
#: Below this mean acceptance length the head is most likely broken or made for another target.
SUSPICIOUS_ACCEPTANCE = 1.1

#: Makes a request of the given id, prompt and parameters.
RequestFactory = Callable[[str, Sequence[int], SamplingParams], Request]


def measure_acceptance(
    engine: Engine, make_request: RequestFactory, prompts: Sequence[Sequence[int]], num_tokens: int = 48
) -> dict[int, float]:
    """Mean tokens per step for each tree size, from one run with the largest trees.

    Trees are grown best first, so the first n nodes of a tree are the tree of n nodes.
    """
    histories: dict[int, list[int]] = {n: [] for n in NODES}

    def record(step: StepRecord) -> None:
        for entry in step.requests:
            if entry.tree.num_nodes > 1:
                for n in NODES:
                    histories[n].append(1 + sum(0 < node < n for node in entry.accepted_nodes))

    previous, engine.on_step = engine.on_step, record
    try:
        options = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=NODES[-1])
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, speculation=options)
        for i, prompt in enumerate(prompts):
            engine.add(make_request(f"warmup-{i}", prompt, params))
        while engine.has_work:
            engine.step()
    finally:
        engine.on_step = previous
    return {n: sum(lengths) / len(lengths) if lengths else 1.0 for n, lengths in histories.items()}


def measure_steps(
    engine: Engine, make_request: RequestFactory, prompt: Sequence[int], max_running: int, max_rows: int
) -> dict[int, dict[int, float]]:
    """Seconds of a whole step for r running requests with trees of n nodes; the best of three. Requests that the pool
    cannot hold at once, with all that these steps write, are not measured."""
    rows = len(prompt) + len(NODES) * 4 * (engine.drafter.max_depth + 1 if engine.drafter else 1) + NODES[-1]
    max_running = min(max_running, engine.pool.num_pages // (-(-rows // engine.target.page_size) + 1))
    costs: dict[int, dict[int, float]] = {}
    previous = engine.scheduler.budget
    options = SpeculationOptions(mode=SpeculationMode.AUTO)
    try:
        for running in (r for r in RUNNING if r <= max_running):
            costs[running] = {}
            for i in range(running):
                params = SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True, speculation=options)
                engine.add(make_request(f"warmup-{i}", prompt, params))
            engine.scheduler.budget = FixedBudget(1)
            while any(r.num_remaining_rows > 1 for r in engine.requests.values()):
                engine.step()
            for nodes in (n for n in NODES if n == 1 or n * running <= min(MAX_ROWS, max_rows)):
                engine.scheduler.budget = FixedBudget(nodes)
                engine.step()
                costs[running][nodes] = min(_timed(engine) for _ in range(3))
                if len(engine.requests) < running:
                    break
            for request_id in list(engine.requests):
                engine.abort(request_id)
    finally:
        engine.scheduler.budget = previous
    return costs


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def warm_up(
    engine: Engine,
    make_request: RequestFactory,
    prompts: Sequence[Sequence[int]],
    *,
    max_running: int,
    max_rows: int,
) -> BudgetTable:
    """Measures acceptance and costs, warns of a head that does not fit, and returns the table of tree sizes."""
    acceptance = measure_acceptance(engine, make_request, prompts)
    lookup, engine.lookup = engine.lookup, None
    try:
        # Repetitions would hide a head that does not fit, and fill the contexts with tokens.
        alone = measure_acceptance(engine, make_request, prompts[:2])[NODES[-1]]
        costs = measure_steps(engine, make_request, prompts[0], max_running, max_rows)
    finally:
        engine.lookup = lookup
    if alone < SUSPICIOUS_ACCEPTANCE:
        _log.warning(
            "draft head: mean acceptance length %.2f with %d nodes at warm-up; the head is probably untrained, or "
            "made for another target. Output is right, but speculation will not pay.",
            alone,
            NODES[-1],
        )
    table = BudgetTable.from_costs(costs, acceptance)
    _log.info("tree nodes by running requests: %s", table.nodes_by_running)
    if engine.prefix_cache is not None:
        engine.prefix_cache.clear()
    engine.reset_counters()
    return table
