"""Mode ``auto`` changes no token, whatever it decides: at every concurrency, with measured and with hostile models."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.engine.draft_choice import NODES, Gains
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.engine.value_model import NUM_DEPTHS, NUM_KNOTS, ValueModel
from support.small_models import VOCAB_SIZE

#: Steps of a device on which speculation pays, and of one on which it does not.
COSTS = {
    "cheap": CostModel(row_knots=(1, 512), row_s=(1e-2, 1.01e-2), draft_knots=(1,), draft_s=(1e-5,)),
    "dear": CostModel(row_knots=(1, 512), row_s=(1e-3, 5e-1), draft_knots=(1, 512), draft_s=(1e-2, 1e-1)),
    "mixed": CostModel(row_knots=(1, 16, 512), row_s=(1e-2, 1.1e-2, 2e-1), draft_knots=(8, 512), draft_s=(2e-3, 5e-2)),
}


def prompts_of(rng: random.Random, count: int) -> list[list[int]]:
    """Some repeat themselves, so that lookups guess too."""
    found = []
    for i in range(count):
        prompt = [rng.randrange(VOCAB_SIZE - 32) for _ in range(rng.randint(1, 40))]
        found.append(prompt * 3 if i % 3 == 0 else prompt)
    return found


def params_of(rng: random.Random, index: int, mode: str | None) -> SamplingParams:
    options = SpeculationOptions(
        mode=mode or rng.choice(("auto", "auto", "auto", "force", "off")),
        latency_class=rng.choice(("interactive", "normal", "batch")),
        max_tree_nodes=rng.choice((None, None, 3, 20)),
        max_depth=rng.choice((None, None, 2)),
    )
    kind = rng.choice(({"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.2}, {"temperature": 0.9}))
    limit = rng.choice((2, 9, 24, 40)) if index else 24
    return SamplingParams(max_tokens=limit, ignore_eos=True, seed=index, speculation=options, **kind)


def policy(cost: CostModel, value: ValueModel, gain: float, llm: LLM) -> PricedBudget:
    depth = llm.engine.drafter.max_depth
    accepted = np.minimum(gain * np.log2(NODES)[:, None], np.arange(1, depth + 1)[None, :])
    return PricedBudget(cost, Gains(accepted=accepted), value=value, has_lookup=True)


@pytest.fixture(scope="module")
def llm(fp64_target: str, fp64_head: str) -> LLM:
    return LLM(
        fp64_target,
        fp64_head,
        dtype="float64",
        num_pages=600,
        page_size=8,
        max_num_requests=64,
        max_num_batched_tokens=512,
        tree_nodes={1: 1},
    )


def completed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, params)]


def plain(params: list[SamplingParams]) -> list[SamplingParams]:
    from dataclasses import replace

    return [replace(p, speculation=SpeculationOptions(mode="off")) for p in params]


@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("concurrency", [1, 2, 4, 8, 16, 32, 64])
def test_every_concurrency(llm: LLM, concurrency: int, cost: str) -> None:
    rng = random.Random(f"{concurrency} {cost}")
    prompts = prompts_of(rng, concurrency)
    params = [params_of(rng, i, None if cost == "mixed" else "auto") for i in range(concurrency)]
    expected = completed(llm, prompts, plain(params))
    drafted: list[int] = []

    def record(step: StepRecord) -> None:
        drafted.append(sum(entry.tree.num_nodes > 1 for entry in step.requests))

    llm.engine.scheduler.budget = policy(COSTS[cost], ValueModel(), 0.8, llm)
    llm.engine.on_step = record
    try:
        assert completed(llm, prompts, params) == expected
    finally:
        llm.engine.on_step = None
    if cost == "cheap":
        assert sum(drafted) > 0
    stats = llm.stats()
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


class Hostile(ValueModel):
    """Maps that have nothing to do with what happens, rising and falling, and change all the time."""

    def __init__(self, seed: int):
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def calibrate(self, tables: Any, kinds: Any) -> Any:
        span = self._rng.choice((1, 1 << 12, 1 << 20, (1 << 31) - 1))
        self.maps = self._rng.integers(-span, span, (2, NUM_DEPTHS, NUM_KNOTS), dtype=np.int64).astype(np.int32)
        return super().calibrate(tables, kinds)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), cost=st.sampled_from(list(COSTS)), gain=st.sampled_from((0.0, 0.3, 2.0)))
def test_hostile_models_cost_no_token(llm: LLM, seed: int, cost: str, gain: float) -> None:
    rng = random.Random(seed)
    count = rng.choice((1, 3, 9))
    prompts = prompts_of(rng, count)
    params = [params_of(rng, i, None) for i in range(count)]
    expected = completed(llm, prompts, plain(params))
    llm.engine.scheduler.budget = policy(COSTS[cost], Hostile(seed), gain, llm)
    assert completed(llm, prompts, params) == expected
