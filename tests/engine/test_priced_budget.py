"""The policy of mode auto: on where it pays, off where not, no flutter between, and probes within their share."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.begun_steps import BegunStep
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.cost_tracker import CostTracker
from jetflow_cluster.engine.draft_choice import NODES, Gains, Situation, choose, num_cohorts
from jetflow_cluster.engine.pace import StepKind
from jetflow_cluster.engine.priced_budget import TURN_ON, PricedBudget
from jetflow_cluster.engine.probing import PROBE_SHARE
from jetflow_cluster.engine.protocols import Allowance, DecodeLoad
from jetflow_cluster.engine.reason_log import ReasonLog

#: Rows are nearly free up to 32, and cost in proportion behind.
COST = CostModel(
    row_knots=(1, 32, 64, 512),
    row_s=(10e-3, 11e-3, 20e-3, 160e-3),
    draft_knots=(8, 512),
    draft_s=(1e-3, 30e-3),
    request_s=1e-5,
    tree_s=1e-4,
    node_s=1e-6,
)


def gains(each: float, depth: int = 7) -> Gains:
    return Gains(accepted=np.minimum(each * np.log2(NODES)[:, None], np.arange(1, depth + 1)[None, :]))


def chosen(num: int, each: float, **more: Any) -> Any:
    situation = Situation(
        num_requests=num, num_context_tokens=100 * num, num_prompt_rows=0, max_nodes=64, num_block_slots=None
    )
    return choose(COST, gains(each), np.ones(num), replace(situation, **more))


def test_the_choice_equals_brute_force() -> None:
    for num in (1, 3, 8):
        best = chosen(num, 0.6)
        rates = {}
        for m in {1, 2, num} if num > 1 else {1}:
            for i, nodes in enumerate(NODES):
                for depth in range(1, 8):
                    shape = StepShape(
                        num_requests=num,
                        num_rows=num + m * (nodes - 1),
                        num_context_tokens=100 * num,
                        num_draft_rows=m * (depth + 1),
                    )
                    won = m * gains(0.6).accepted[i, depth - 1]
                    rates[m, nodes, depth] = (num + won) / COST.step_s(shape)
        assert best.tokens_per_s >= max(rates.values()) * (1 - 1e-9)
        assert rates.get((best.num_drafted, best.num_nodes, best.depth), best.tokens_per_s) == pytest.approx(
            best.tokens_per_s
        )


def test_more_load_means_fewer_nodes_down_to_none() -> None:
    rows = [chosen(num, 0.6) for num in (1, 4, 16, 64)]
    assert rows[0].ratio > 2.0
    assert [row.num_nodes for row in rows] == sorted((row.num_nodes for row in rows), reverse=True)
    assert rows[-1].ratio < TURN_ON < rows[0].ratio


@pytest.mark.parametrize(("row_s", "expected"), [((10e-3, 10e-3), 1), ((1e-3, 200e-3), 2)], ids=["memory", "compute"])
def test_two_cohorts_only_where_halves_are_cheap(row_s: tuple[float, float], expected: int) -> None:
    cost = CostModel(row_knots=(1, 512), row_s=row_s, draft_knots=(1, 512), draft_s=row_s)
    assert num_cohorts(cost, num_requests=32, num_nodes=8, depth=7, num_context_tokens=0) == expected
    assert num_cohorts(cost, num_requests=1, num_nodes=8, depth=7, num_context_tokens=0) == 1


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_costs_follow_what_steps_take(slower: float) -> None:
    tracker, rng = CostTracker(COST), random.Random(2)
    shapes = [
        StepShape(num_requests=4, num_rows=4 * n, num_draft_rows=32 if n > 1 else 0, num_context_tokens=400)
        for n in (1, 4, 16)
    ]
    for _ in range(400):
        shape = rng.choice(shapes)
        held_up = 20.0 if rng.random() < 0.02 else 1.0
        tracker.observe(shape, slower * COST.step_s(shape) * rng.uniform(0.95, 1.05) * held_up)
    for shape in shapes:
        assert tracker.model.step_s(shape) == pytest.approx(slower * COST.step_s(shape), rel=0.12)


@pytest.fixture(scope="module")
def llm(tiny_target: str, tiny_head: str) -> LLM:
    return LLM(
        tiny_target,
        tiny_head,
        dtype="float64",
        num_pages=256,
        page_size=8,
        tree_nodes={1: 1},
        max_num_requests=16,
        context_lookup=False,
    )


class Clocked(PricedBudget):
    """Steps take what the cost model says."""

    virtual_s = extra_s = 0.0

    def observe(self, plan: Any, trees: Any, paths: Any, took_s: float) -> None:
        rows = sum(tree.num_nodes for tree in trees)
        begun = self._begun.of(plan)
        num_draft_rows = begun.num_draft_rows if begun is not None else 0
        shape = StepShape(num_requests=len(trees), num_rows=rows, num_draft_rows=num_draft_rows)
        took_s = COST.step_s(shape)
        plain_s = COST.step_s(replace(shape, num_rows=len(trees), num_draft_rows=0))
        self.virtual_s += took_s
        self.extra_s += took_s - plain_s
        super().observe(plan, trees, paths, took_s)


def run(llm: LLM, budget: PricedBudget, count: int, num_tokens: int = 200) -> None:
    llm.engine.scheduler.budget = budget
    options = SpeculationOptions(mode="auto")
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, speculation=options)
    llm.generate([[3 * i + 1, 5, 7] for i in range(count)], params)


@pytest.mark.slow
def test_a_useless_head_costs_its_share_and_one_line(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """The head is random, and its gains were overrated: that is found out, said once, and tried again now and then."""
    budget = Clocked(COST, gains(0.6))
    with caplog.at_level(logging.INFO, "jetflow_cluster.engine.reason_log"):
        for _ in range(4):
            run(llm, budget, 2)
    assert budget.reason == "head"
    assert llm.stats().speculation_reason == "head"
    assert sum("guesses are worth too little" in r.message for r in caplog.records) == 1
    learned_s, learned_at = budget.extra_s, budget.virtual_s
    for _ in range(8):
        run(llm, budget, 2)
    assert budget.learning.prober.num_probes > 0
    assert budget.extra_s - learned_s <= 2.0 * PROBE_SHARE * (budget.virtual_s - learned_at) + 0.05
    assert budget.learning.level(0) < 0.4


def test_off_for_load_keeps_and_probes_nothing(llm: LLM) -> None:
    dear = CostModel(row_knots=(1, 512), row_s=(1e-3, 600e-3), draft_knots=(1, 512), draft_s=(1e-2, 1e-1))
    budget = PricedBudget(dear, gains(0.6))
    run(llm, budget, 8, 60)
    assert budget.reason == "load"
    assert not budget.keeps_context
    assert budget.learning.prober.num_probes == 0
    assert budget.price_per_s > 0


def test_off_for_load_learns_from_one_step_in_four(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that one counts for all: costs stay as current, and credit for probes grows as fast."""
    dear = CostModel(row_knots=(1, 512), row_s=(1e-3, 600e-3), draft_knots=(1, 512), draft_s=(1e-2, 1e-1))
    budget = PricedBudget(dear, gains(0.6))
    noted: list[int] = []
    note = budget.learning.note

    def watched(begun: BegunStep, *rest: Any) -> bool:
        noted.append(begun.num_steps)
        return note(begun, *rest)

    monkeypatch.setattr(budget.learning, "note", watched)
    first = llm.stats().num_steps
    run(llm, budget, 8, 80)
    num_steps = llm.stats().num_steps - first
    assert set(noted) == {1, 4}
    assert len(noted) < num_steps / 2
    assert abs(sum(noted) - num_steps) <= 4


def test_nothing_flutters_at_the_crossing(llm: LLM) -> None:
    """Gains that vary by a hundredth around the crossing switch nothing; ones that fall well below it do."""
    requests = [llm.frontend.make_request(f"r{i}", [1, 2, 3], SamplingParams(max_tokens=99)) for i in range(12)]
    load = DecodeLoad(requests=requests, num_decoding=12, fair_nodes=64)

    def is_on(budget: PricedBudget, each: float) -> bool:
        budget.gains = replace(gains(each), sampled_share=1.0)
        budget._decide(load)
        return budget.is_on

    crossing = next(each for each in np.arange(0.02, 2.0, 0.005) if is_on(PricedBudget(COST, gains(0.0)), each))
    budget, rng = PricedBudget(COST, gains(0.0)), random.Random(3)
    states = [is_on(budget, crossing * rng.uniform(0.99, 1.01)) for _ in range(200)]
    assert sum(a != b for a, b in pairwise(states)) == 1 - states[0]
    assert states[-1]
    assert not is_on(budget, 0.7 * crossing)


def test_drafting_that_is_ahead_goes_on_whatever_costs_foretell(llm: LLM) -> None:
    requests = [llm.frontend.make_request(f"r{i}", [1, 2, 3], SamplingParams(max_tokens=99)) for i in range(8)]
    load = DecodeLoad(requests=requests, num_decoding=8, fair_nodes=64)
    budget = PricedBudget(COST, gains(0.0))

    def decide(each: float) -> bool:
        budget.gains = gains(each)
        budget._decide(load)
        return budget.is_on

    assert decide(1.0) and not decide(0.1)
    for kind, tokens, took_s in ((StepKind.HEAD, 20, 20e-3), (StepKind.PLAIN, 8, 10e-3)):
        for _ in range(12):
            budget.learning.pace.observe(kind, 8, tokens, took_s)
    assert not decide(0.1), "what is off begins by what is foretold"
    assert decide(1.0) and decide(0.1)
    for _ in range(200):
        budget.learning.pace.observe(StepKind.HEAD, 8, 20, 26e-3)
    assert not decide(0.1)


def test_outcomes_are_counted_for_the_step_that_they_are_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the policy decides on the next step before it is told of the last one."""
    drafted: list[bool] = []
    counted: list[bool] = []

    class EveryOther(PricedBudget):
        num = 0

        def allow(self, load: DecodeLoad) -> list[Allowance]:
            found = super().allow(load)
            self.num += 1
            return found if self.num % 2 else [replace(one, uses_head=False, max_tree_nodes=1) for one in found]

        def price(self, plan: Any, tables: Any) -> Any:
            if all(item.is_priced for item in plan.items):
                drafted.append(any(table is not None for table in tables))
            return super().price(plan, tables)

    budget = EveryOther(COST, gains(2.0))
    monkeypatch.setattr(budget.learning.pace, "observe", lambda kind, *_, **__: counted.append(kind is StepKind.HEAD))
    run(llm, budget, 2, 24)
    assert counted == drafted[: len(counted)]
    assert len(counted) > 4
    assert {True, False} == set(counted)


def test_steps_are_timed_as_what_they_are(llm: LLM) -> None:
    """Steps of requests that never speculate are plain ones whatever came before; forced drafting is drafting."""
    seen: list[tuple[str, int, int]] = []

    class Watched(PricedBudget):
        def observe(self, plan: Any, trees: Any, paths: Any, took_s: float) -> None:
            modes = {item.request.params.speculation.mode.value for item in plan.items}
            if len(modes) == 1 and all(item.num_rows == 1 for item in plan.items):
                num_nodes = sum(tree.num_nodes - 1 for tree in trees)
                seen.append((modes.pop(), num_nodes, self._begun.of(plan).num_draft_rows))
            super().observe(plan, trees, paths, took_s)

    llm.engine.scheduler.budget = Watched(COST, gains(2.0))
    for mode in ("auto", "off", "force", "off"):
        options = SpeculationOptions(mode=mode)
        llm.generate([[7, 5, 3]], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, speculation=options))
    for mode in ("auto", "force"):
        assert any(rows for kind, nodes, rows in seen if kind == mode and nodes)
    assert {(nodes, rows) for kind, nodes, rows in seen if kind == "off"} == {(0, 0)}


@pytest.mark.parametrize(
    ("most", "learned", "level"),
    [(0.3, 1.0, logging.WARNING), (4.0, 0.1, logging.WARNING), (4.0, 0.8, logging.INFO)],
    ids=["useless", "found-useless", "good"],
)
def test_only_a_useless_head_is_worth_a_warning(
    most: float, learned: float, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    told = ReasonLog()
    with caplog.at_level(logging.INFO, "jetflow_cluster.engine.reason_log"):
        for _ in range(3):
            told.tell("head", 0.9, most, (learned, 1.0))
        told.tell("load", 0.9, most, (1.0, 1.0))
    assert [record.levelno for record in caplog.records] == [level, logging.INFO]
    assert f"{most:.2f} of the head's guesses" in caplog.records[0].message


def test_guesses_beside_those_of_a_head_do_not_hide_it() -> None:
    assert gains(0.6).most_of_head == pytest.approx(0.6 * np.log2(NODES[-1]))
    assert replace(gains(0.6), of_head=0.02).most_of_head == 0.02
    assert replace(gains(0.6), of_head=0.02).hoped().accepted.max() > 3
