"""Interleaved rounds: in each, every system completes the same requests, in an order that changes.

A machine that speeds up or slows down does so for all systems, and ratios are taken within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jetflow_cluster.bench.load.arrivals import poisson_arrivals, trace_arrivals
from jetflow_cluster.bench.load.systems import LoadSystem
from jetflow_cluster.bench.load.workload import LoadRun, make_requests
from jetflow_cluster.bench.prompts import BenchPrompt

LOOPS = ("closed", "poisson", "trace")


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is asked of the systems. Raises ValueError naming field, value and limit."""

    #: ``closed``: so many requests at a time; ``poisson`` and ``trace``: requests arrive whatever the systems do.
    loop: str = "closed"
    #: Requests at a time, each measured on its own (closed loop).
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    #: Requests per second, each measured on its own (open loops).
    rates: tuple[float, ...] = ()
    num_rounds: int = 10
    #: Requests of a round: this many for each request at a time (closed), or in all (open).
    num_requests: int = 1
    prompt_lengths: tuple[int, ...] = (32, 64, 128)
    output_lengths: tuple[int, ...] = (64,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loop not in LOOPS:
            raise ValueError(f"loop = {self.loop!r}: must be among {', '.join(LOOPS)}")
        if self.loop != "closed" and not self.rates:
            raise ValueError(f"rates = (): loop {self.loop!r} needs requests per second")
        for name in ("concurrencies", "prompt_lengths", "output_lengths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} = {values}: must be one or more numbers of at least 1")
        if self.rates and min(self.rates) <= 0:
            raise ValueError(f"rates = {self.rates}: must be above 0")
        for name in ("num_rounds", "num_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")

    @property
    def levels(self) -> tuple[float, ...]:
        """Concurrencies of a closed loop, rates of an open one."""
        return self.concurrencies if self.loop == "closed" else self.rates


def measure(
    plan: LoadPlan,
    systems: Sequence[LoadSystem],
    prompts: Sequence[BenchPrompt],
    *,
    trace: Sequence[float],
    runs_at: Callable[[LoadSystem, float], bool] = lambda system, level: True,
    max_s: float | None = None,
    on_progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """One sample per level, round and system, as plain JSON values.

    Args:
        plan: what is asked.
        systems: who is asked; outputs of the first one are what the others' are compared with.
        prompts: to draw from.
        trace: arrivals of the loop ``trace``, one per unit of time.
        runs_at: whether a system takes part at a level.
        max_s: seconds behind which no turn but the first begins, so that there may be fewer rounds; None is no limit.
        on_progress: told a label, the runs done and their total.
    """
    samples: list[dict[str, Any]] = []
    turns = [(level, i) for i in range(plan.num_rounds) for level in plan.levels]
    total = sum(runs_at(system, level) for level, _ in turns for system in systems)
    for level in plan.levels:
        for system in systems:
            if runs_at(system, level):
                on_progress(f"warming up: {system.name}", 0, total)
                _run(plan, system, prompts, level, "warm-up", trace)
    began = time.monotonic()
    for level, index in turns:
        if samples and max_s is not None and time.monotonic() - began > max_s:
            break
        order = [system for system in systems if runs_at(system, level)]
        random.Random(f"{plan.seed}/{level}/{index}").shuffle(order)
        runs: dict[str, LoadRun] = {}
        for system in order:
            on_progress(f"{plan.loop} {level:g}: {system.name}", len(samples) + len(runs), total)
            runs[system.name] = _run(plan, system, prompts, level, str(index), trace)
        reference = next(runs[system.name] for system in systems if system.name in runs)
        samples += [_sample(plan, level, index, s.name, runs[s.name], reference) for s in systems if s.name in runs]
    on_progress("done", total, total)
    return samples


def _run(
    plan: LoadPlan, system: LoadSystem, prompts: Sequence[BenchPrompt], level: float, name: str, trace: Sequence[float]
) -> LoadRun:
    seed = f"{plan.seed}/{level:g}/{name}"
    is_closed = plan.loop == "closed"
    count = plan.num_requests * int(level) if is_closed else plan.num_requests
    arrivals = None
    if plan.loop == "poisson":
        arrivals = poisson_arrivals(count, level, random.Random(seed).getrandbits(32))
    elif plan.loop == "trace":
        arrivals = trace_arrivals(list(trace), count, level)
    requests = make_requests(
        prompts,
        count,
        prompt_lengths=plan.prompt_lengths,
        output_lengths=plan.output_lengths,
        arrivals=arrivals,
        seed=seed,
    )
    return system.run(requests, int(level) if is_closed else count)


def _sample(plan: LoadPlan, level: float, index: int, name: str, run: LoadRun, reference: LoadRun) -> dict[str, Any]:
    num_steps = sum(outcome.num_steps for outcome in run.outcomes)
    num_accepted = sum(outcome.num_accepted for outcome in run.outcomes)
    firsts = sorted(outcome.first_s for outcome in run.outcomes)
    same = sum(a.token_ids == b.token_ids for a, b in zip(run.outcomes, reference.outcomes, strict=True))
    return {
        "loop": plan.loop,
        "level": level,
        "round": index,
        "system": name,
        "seconds": round(run.seconds, 6),
        "held_s": round(run.held_s, 6),
        "tokens_per_s": round(run.tokens_per_s, 3),
        "request_tokens_per_s": round(statistics.median(o.tokens_per_s for o in run.outcomes), 3),
        "first_s": round(statistics.median(firsts), 6),
        "first_p95_s": round(firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))], 6),
        "mean_acceptance_length": round(1 + num_accepted / num_steps, 4) if num_steps else None,
        "planning_share": round(run.planning_share, 5) if run.planning_share is not None else None,
        "num_requests": len(run.outcomes),
        "num_same_outputs": same,
    }
