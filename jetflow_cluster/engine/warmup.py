"""Measures, before an engine serves, what its steps cost and what its trees are worth."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.cost_fit import fit_costs
from jetflow_cluster.engine.cost_model import PARTS, CostModel, StepShape
from jetflow_cluster.engine.cost_store import CostStore
from jetflow_cluster.engine.draft_choice import NODES, Gains
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import AheadDrafter, Allowance, BudgetPolicy, DecodeLoad, StepRecord
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

_log = logging.getLogger(__name__)

#: Running requests and tree sizes of which steps are measured.
RUNNING = (1, 2, 4, 8, 16, 32, 64)
MEASURED_NODES = (1, 2, 4, 8, 16, 32, 64)
#: Rows of a step that warm-up measures at most; larger ones never pay on a device where these do not.
MAX_ROWS = 512
#: Running requests of which steps with long and unequal prefixes are measured, and their lengths: what attention reads
#: and how it is divided into calls depends on both.
UNEVEN_RUNNING = (4, 16)
UNEVEN_LENGTHS = (64, 224, 112, 160)
#: Below this mean acceptance length the head is most likely broken or made for another target.
SUSPICIOUS_ACCEPTANCE = 1.1
#: A stored model is believed when it foretells a few steps within this factor.
_BELIEVED = 1.5
#: Steps of each size, and of those up to so many rows: the choice at small loads is among these, and they take little.
_NUM_TIMES, _NUM_TIMES_FEW, _FEW_ROWS = 3, 6, 32
#: Seconds of one size's steps after which the next is taken up: on a slow or busy machine one long step shows as much,
#: and all sizes would take minutes.
_CELL_S = 0.5

#: Makes a request of the given id, prompt and parameters.
RequestFactory = Callable[[str, Sequence[int], SamplingParams], Request]


def measure_gains(
    engine: Engine,
    make_request: RequestFactory,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    num_tokens: int = 48,
) -> np.ndarray:
    """Mean accepted tokens by tree size and depth, ``[len(NODES), D]``, from one run with the largest trees.

    Trees are grown best first, so the first n nodes of a tree that are at most d deep are the tree of that many nodes
    and that depth. The last column is for any depth.
    """
    num_depths = engine.drafter.max_depth if engine.drafter is not None else 1
    total, num_trees = np.zeros((len(NODES), num_depths)), 0

    def record(step: StepRecord) -> None:
        nonlocal num_trees
        for entry in step.requests:
            if entry.tree.num_nodes > 1:
                depths = np.array(entry.tree.depths)
                is_right = np.zeros(len(depths), bool)
                is_right[entry.accepted_nodes[1:]] = True
                for d in range(1, num_depths + 1):
                    hit = is_right[depths <= (d if d < num_depths else 64)]
                    total[:, d - 1] += [hit[:n].sum() for n in NODES]
                num_trees += 1

    previous, engine.on_step = engine.on_step, record
    try:
        options = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=NODES[-1])
        params = SamplingParams(
            temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=1, speculation=options
        )
        for i, prompt in enumerate(prompts):
            engine.add(make_request(f"warmup-{i}", prompt, params))
        while engine.has_work:
            engine.step()
    finally:
        engine.on_step = previous
    return total / max(num_trees, 1)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Steps of one size."""

    num_requests: int
    num_nodes: int
    depth: int | None = None
    #: Requests with trees; None is all of them.
    num_grown: int | None = None


class _MeasuredBudget(FixedBudget):
    """A tree size and depth for a cell's requests, and no draft context where nothing is drafted."""

    def __init__(self, cell: _Cell):
        super().__init__(cell.num_nodes)
        self._cell = cell

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        """Trees of exactly this size."""
        cell, num = self._cell, len(load.requests)
        if cell.num_nodes == 1:
            # As where speculation is off: nothing is kept for later.
            return [Allowance(keeps_context=False)] * num
        grown = Allowance(max_tree_nodes=cell.num_nodes, budget_share=cell.num_nodes, max_depth=cell.depth)
        num_grown = num if cell.num_grown is None else cell.num_grown
        return [grown] * num_grown + [Allowance()] * (num - num_grown)


def measure_steps(
    engine: Engine,
    make_request: RequestFactory,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[_Cell],
    *,
    max_running: int,
) -> list[tuple[StepShape, float]]:
    """Shapes and seconds of steps: of each cell, and of the prompts on the way, which requests take in turn. Requests
    that the pool cannot hold at once, with all that these steps write, are not measured. Cells are all plain, or all
    with trees: steps that keep no draft context leave none for others."""
    num_slots = engine.drafter.max_depth + 1 if engine.drafter else 1
    rows = max(map(len, prompts)) + len(MEASURED_NODES) * (_NUM_TIMES_FEW + 1) * num_slots + MEASURED_NODES[-1]
    page_size = engine.target.page_size
    max_running = min(max_running, engine.pool.num_pages // (-(-rows // page_size) + 1))
    samples: list[tuple[StepShape, float]] = []
    previous = engine.scheduler.budget
    options = SpeculationOptions(mode=SpeculationMode.AUTO)
    params = SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True, speculation=options)
    try:
        for running in sorted({cell.num_requests for cell in cells if cell.num_requests <= max_running}):
            for i in range(running):
                engine.add(make_request(f"warmup-{i}", prompts[i % len(prompts)], params))
            engine.scheduler.budget = FixedBudget(1)
            while any(r.num_remaining_rows > 1 for r in engine.requests.values()):
                num_rows = sum(r.num_remaining_rows for r in engine.requests.values())
                took_s = _timed(engine)
                left = [r.num_remaining_rows for r in engine.requests.values()]
                samples.append((StepShape(num_prompt_rows=num_rows - sum(n for n in left if n > 1)), took_s))
            for cell in (cell for cell in cells if cell.num_requests == running):
                engine.scheduler.budget = _MeasuredBudget(cell)
                engine.step()
                began = time.perf_counter()
                for _ in range(_NUM_TIMES if cell.num_requests * cell.num_nodes > _FEW_ROWS else _NUM_TIMES_FEW):
                    took_s = _timed(engine)
                    if len(engine.requests) < running:
                        break
                    samples.append((_shape(engine, cell, num_slots), took_s))
                    if time.perf_counter() - began > _CELL_S:
                        break
                if len(engine.requests) < running:
                    break
            for request_id in list(engine.requests):
                engine.abort(request_id)
    finally:
        engine.scheduler.budget = previous
    return samples


def _shape(engine: Engine, cell: _Cell, num_slots: int) -> StepShape:
    # Rounded, so that the times of one cell are of one shape and the least counts.
    context = sum(r.num_computed for r in engine.requests.values()) // 64 * 64
    num_grown = 0 if cell.num_nodes == 1 else cell.num_requests if cell.num_grown is None else cell.num_grown
    slots = min(num_slots, cell.depth + 1) if cell.depth else num_slots
    return StepShape(
        num_requests=cell.num_requests,
        num_rows=cell.num_requests + num_grown * (cell.num_nodes - 1),
        num_context_tokens=context,
        num_draft_rows=num_grown * slots,
        num_draft_context_tokens=context * num_grown // cell.num_requests,
    )


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _measured(
    engine: Engine,
    make_request: RequestFactory,
    prompt: Sequence[int],
    cells: Sequence[_Cell],
    *,
    max_running: int,
    lengths: Sequence[int] = (),
) -> list[tuple[StepShape, float]]:
    """Plain cells first, then those with trees; prompts of the given lengths in the place of this one."""
    prompts = [(list(prompt) * (n // len(prompt) + 1))[:n] for n in lengths] or [list(prompt)]
    samples: list[tuple[StepShape, float]] = []
    for is_plain in (True, False):
        chosen = [cell for cell in cells if (cell.num_nodes == 1) is is_plain]
        if chosen:
            samples += measure_steps(engine, make_request, prompts, chosen, max_running=max_running)
    return samples


def measure_costs(
    engine: Engine,
    make_request: RequestFactory,
    prompt: Sequence[int],
    *,
    max_running: int,
    max_rows: int,
    max_len: int,
) -> CostModel | None:
    """The cost of this engine's steps; None when the pool does not hold one request for so long."""
    most = min(MAX_ROWS, max_rows)
    running = [r for r in RUNNING if r <= max_running]
    plain = [_Cell(num_requests=r, num_nodes=1) for r in running]
    cells = [_Cell(num_requests=r, num_nodes=n) for r in running for n in MEASURED_NODES[1:] if n * r <= most]
    if engine.drafter is not None and engine.drafter.max_depth > 3:
        shallow = [replace(cell, depth=3) for cell in cells if cell.num_requests in (1, 8) and cell.num_nodes == 4]
        cells = shallow + cells
    uneven = [
        _Cell(num_requests=r, num_nodes=n, num_grown=grown)
        for r in UNEVEN_RUNNING
        for n, grown in ((1, None), (8, None), (16, 1), (4, 2), (8, 1))
        if r <= max_running and n * r <= most
    ]
    lengths = [min(n, max_len // 2) for n in UNEVEN_LENGTHS]
    samples = _measured(engine, make_request, prompt, plain + cells, max_running=max_running)
    samples += _measured(engine, make_request, prompt, uneven, max_running=max_running, lengths=lengths)
    return fit_costs(samples) if any(shape.num_requests for shape, _ in samples) else None


def check_costs(
    engine: Engine,
    make_request: RequestFactory,
    prompt: Sequence[int],
    stored: CostModel,
    *,
    max_running: int,
    max_rows: int,
) -> CostModel | None:
    """A stored model, scaled to what a few steps take; None where they show that it was measured on a busy machine."""
    sizes = [(r, n) for r in (1, 8) for n in (1, 8) if r <= max_running and r * n <= min(MAX_ROWS, max_rows)]
    cells = [_Cell(num_requests=r, num_nodes=n) for r, n in sizes]
    scale = _scale_of(stored, _measured(engine, make_request, prompt, cells, max_running=max_running))
    return stored.scaled([scale] * len(PARTS)) if scale is not None else None


def _scale_of(stored: CostModel, samples: Sequence[tuple[StepShape, float]]) -> float | None:
    """The factor with which a stored model goes on to be used; None where it is to be measured again.

    Other work only ever adds to a step's time. So steps that are much faster than the model predicts show that the
    model is wrong, and steps that are much slower, or not alike, that the machine is busy now: the model stays, and is
    followed up while it is used.
    """
    least: dict[StepShape, float] = {}
    for shape, took_s in samples:
        if shape.num_requests:
            least[shape] = min(took_s, least.get(shape, took_s))
    if not least:
        return 1.0
    ratios = [took_s / stored.step_s(shape) for shape, took_s in least.items()]
    middle = statistics.median(ratios)
    if middle < 1 / _BELIEVED:
        return None
    is_quiet = middle < _BELIEVED and max(ratios) / min(ratios) < _BELIEVED
    return middle if is_quiet else 1.0


def warm_up(
    engine: Engine,
    make_request: RequestFactory,
    prompts: Sequence[Sequence[int]],
    *,
    max_running: int,
    max_rows: int,
    max_len: int,
    store: CostStore | None = None,
) -> BudgetPolicy:
    """Measures gains and costs, or takes what was stored; warns of a head that does not fit, and returns the policy of
    mode ``auto``; where nothing can be measured, that is no speculation."""
    limits = {"max_running": max_running, "max_rows": max_rows, "max_len": max_len}

    def measured() -> tuple[Gains, CostModel | None]:
        return _load_or_measure(engine, make_request, prompts, store=store, **limits)

    if store is None or store.is_filled:
        gains, cost = measured()
    else:
        with store.alone():
            gains, cost = measured()
    if 1.0 + gains.most_of_head < SUSPICIOUS_ACCEPTANCE:
        _log.warning(
            "draft head: mean acceptance length %.2f with %d nodes at warm-up; the head is probably untrained, or "
            "made for another target. Output is right, but speculation will not pay.",
            1.0 + gains.most_of_head,
            NODES[-1],
        )
    if engine.prefix_cache is not None:
        engine.prefix_cache.clear()
    engine.reset_counters()
    if cost is None:
        return FixedBudget(1)
    drafter = engine.drafter
    budget = PricedBudget(
        cost,
        gains,
        needs_context=bool(drafter is not None and drafter.tap_layer_ids),
        num_block_slots=drafter.num_block_slots if drafter is not None else None,
        has_lookup=engine.lookup is not None,
        may_overlap=isinstance(drafter, AheadDrafter),
    )
    accepted = gains.accepted[:, -1].tolist()
    _log.info("accepted tokens of a tree of %s nodes: %s", NODES, [round(g, 2) for g in accepted])
    return budget


def _load_or_measure(
    engine: Engine,
    make_request: RequestFactory,
    prompts: Sequence[Sequence[int]],
    *,
    store: CostStore | None,
    max_running: int,
    max_rows: int,
    max_len: int,
) -> tuple[Gains, CostModel | None]:
    gains = store.load_gains() if store is not None else None
    if gains is None:
        gains = _measure_all_gains(engine, make_request, prompts)
        if store is not None:
            store.save_gains(gains)
    lookup, engine.lookup = engine.lookup, None
    limits = {"max_running": max_running, "max_rows": max_rows}
    try:
        stored = store.load() if store is not None else None
        cost = check_costs(engine, make_request, prompts[0], stored, **limits) if stored is not None else None
        if cost is None:
            cost = measure_costs(engine, make_request, prompts[0], max_len=max_len, **limits)
            if store is not None and cost is not None:
                store.save(cost)
    finally:
        engine.lookup = lookup
    return gains, cost


def _measure_all_gains(engine: Engine, make_request: RequestFactory, prompts: Sequence[Sequence[int]]) -> Gains:
    greedy = measure_gains(engine, make_request, prompts)
    lookup, engine.lookup = engine.lookup, None
    try:
        # Repetitions would hide a head that does not fit, and fill the contexts with tokens.
        alone = 1.0 + float(measure_gains(engine, make_request, prompts[:2])[-1, -1])
        sampled = measure_gains(engine, make_request, prompts[:2], temperature=1.0, num_tokens=32)
    finally:
        engine.lookup = lookup
    share = float(sampled.sum() / greedy.sum()) if greedy.sum() > 0 else 1.0
    return Gains(accepted=greedy, sampled_share=min(max(share, 0.1), 1.5), of_head=alone - 1.0)
