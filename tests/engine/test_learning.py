"""What steps teach a policy, when, and what they must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.begun_steps import BegunStep
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.engine.draft_choice import NODES, Gains, Situation, choose
from jetflow_cluster.engine.learning import Learning
from jetflow_cluster.engine.pace import StepKind
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import DecodeLoad, ScheduledRequest, Source, StepPlan
from jetflow_cluster.engine.value_model import ValueModel
from jetflow_cluster.engine.worth import Worth
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree
from support.small_models import write_head, write_target
from support.static_engines import engine_options, make_static

COST = CostModel(row_knots=(1, 512), row_s=(10e-3, 20e-3), draft_knots=(8, 512), draft_s=(1e-4, 1e-3))
GAINS = Gains(accepted=np.minimum(0.6 * np.log2(NODES)[:, None], np.arange(1, 8)[None, :]))
TREE = DraftTree(token_ids=[0, 1, 2], parents=[-1, 0, 1], depths=[0, 1, 2], scores=[0, -100, -50_000])
PATH = AcceptedPath(nodes=[0, 1], token_ids=[1, 5])


def request(arrival: int, mode: str = "auto") -> Any:
    params = SamplingParams(temperature=0.0, speculation=SpeculationOptions(mode=mode))
    return SimpleNamespace(
        params=params, room=50, has_draft_context=True, num_computed=20, arrival=arrival, worth=Worth()
    )


def step(mode: str = "auto", num: int = 2) -> BegunStep:
    items = [
        ScheduledRequest(request=request(i, mode), num_rows=1, is_last=True, max_tree_nodes=8, max_depth=24)
        for i in range(num)
    ]
    return BegunStep(items=tuple(items), num_context_tokens=40, num_draft_rows=16)


def load(num: int) -> DecodeLoad:
    return DecodeLoad(requests=[request(i) for i in range(num)], num_decoding=num, fair_nodes=64, num_prompt_rows=0)


def test_steps_are_learned_from_together() -> None:
    learning = Learning(COST, ValueModel())
    learned = [learning.note(step(), [TREE, TREE], [PATH, PATH], 0.01) for _ in range(16)]
    assert learned == [i % 8 == 7 for i in range(16)]
    assert learning.value._seen.sum() == 16 * 2 * 2
    learning.note(step(), [TREE, TREE], [PATH, PATH], 0.01)
    learning.catch_up()
    assert learning.value._seen.sum() == 17 * 2 * 2


@pytest.mark.parametrize(("mode", "teaches"), [("auto", True), ("force", False)])
def test_only_trees_of_calibrated_scores_teach_the_calibration(mode: str, teaches: bool) -> None:
    learning = Learning(COST, ValueModel())
    begun = step(mode)
    for _ in range(8):
        learning.note(begun, [TREE, TREE], [PATH, PATH], 0.01)
    assert bool(learning.value._seen.any()) is teaches
    assert (begun.items[0].request.worth.promised > 0) is teaches


@pytest.mark.parametrize(("accepted", "lasts"), [(24.0, False), (3.0, True)], ids=["better", "worse"])
def test_only_what_was_better_than_at_warm_up_is_forgotten_while_nothing_is_drafted(
    accepted: float, lasts: bool
) -> None:
    learning = Learning(COST, ValueModel())
    learning._levels[0] = [accepted, 12.0]
    before, bare = learning.level(0), DraftTree.root_only(1)
    path = AcceptedPath(nodes=[0], token_ids=[1])
    for _ in range(200):
        learning.note(replace(step(), num_steps=2), [bare, bare], [path, path], 0.01)
    assert (learning.level(0) == before) is lasts
    assert lasts or 1.0 < learning.level(0) < 1.05


def test_the_head_has_no_more_rows_than_its_block() -> None:
    """Though a request's own text may guess deeper."""
    budget = PricedBudget(COST, GAINS, has_lookup=True)
    items = step(num=3).items
    assert items[0].head_depth == 24
    plan = budget.price_rows(StepPlan(items=items, tree_budget=24), [Source.HEAD, Source.HEAD, Source.CHAIN])
    assert plan.row_costs is not None
    begun = budget._begun.of(plan)
    assert (begun.num_draft_rows, begun.num_context_tokens) == (2 * 8, 3 * 20)


def test_what_was_allowed_holds_until_something_is_learned() -> None:
    budget = PricedBudget(COST, GAINS)
    asked = load(2)
    allowed = budget.allow(asked)
    assert budget.is_on and allowed[0].max_tree_nodes > 1
    plan = StepPlan(items=step().items)
    budget.price_rows(plan, [Source.HEAD] * 2)
    for _ in range(7):
        assert budget.allow(asked) is allowed
        budget.observe(plan, [TREE, TREE], [PATH, PATH], 0.01)
    budget.observe(plan, [TREE, TREE], [PATH, PATH], 0.01)
    assert budget.allow(asked) is not allowed
    assert budget.allow(load(3)) is not budget.allow(asked), "other requests, other allowances"


def test_plain_steps_are_asked_for_once_until_they_are_known() -> None:
    budget = PricedBudget(COST, GAINS)
    asked = load(2)
    for _ in range(6):
        budget.learning.pace.observe(StepKind.HEAD, 2, 6, 1.0)
    drafts = [budget.allow(asked)[0].max_tree_nodes > 1 for _ in range(5)]
    assert drafts == [False, True, True, True, True]


def test_some_may_draft_where_that_is_clearly_better_than_all() -> None:
    situation = Situation(num_requests=4, num_context_tokens=100, num_prompt_rows=0, max_nodes=64, num_block_slots=None)
    cost = CostModel(row_knots=(1, 512), row_s=(10e-3, 800e-3), draft_knots=(8, 512), draft_s=(1e-4, 8e-3))
    alike, unlike = np.array([1.1, 1.1, 0.9, 0.9]), np.array([1.5, 0.1, 0.1, 0.1])
    assert choose(cost, GAINS, alike, situation).num_drafted == 4
    assert choose(cost, GAINS, unlike, situation).num_drafted == 1


def test_a_newcomer_is_news_where_guesses_were_the_reason() -> None:
    dear = CostModel(row_knots=(1, 512), row_s=(10e-3, 20e-3), draft_knots=(8, 512), draft_s=(5e-3, 8e-3))
    budget = PricedBudget(dear, GAINS)
    poor = load(1)
    poor.requests[0].worth.accepted, poor.requests[0].worth.promised = 0.0, 60.0
    assert budget.allow(poor)[0].max_tree_nodes == 1
    assert (budget.is_on, budget.reason) == (False, "head")
    newcomer = DecodeLoad(requests=[request(7)], num_decoding=1, fair_nodes=64, num_prompt_rows=0)
    assert budget.allow(newcomer)[0].max_tree_nodes > 1


def test_less_room_is_kept_to_at_once() -> None:
    """As where a prompt has come that takes half of the rows."""
    budget = PricedBudget(COST, GAINS)
    budget.allow(load(2))
    narrow = DecodeLoad(requests=load(2).requests, num_decoding=2, fair_nodes=5, num_prompt_rows=90)
    assert [allowed.budget_share for allowed in budget.allow(narrow)] == [5, 5]


def test_all_that_may_draft_are_no_part_of_those_that_decode() -> None:
    situation = Situation(num_requests=3, num_context_tokens=100, num_prompt_rows=0, max_nodes=64, num_block_slots=None)
    found = choose(COST, GAINS, np.ones(1), situation)
    num_nodes, gain = found.num_nodes, GAINS.accepted[NODES.index(found.num_nodes), found.depth - 1]
    seconds = COST.plain_s(3, 100) + COST.trees_s(3, num_nodes - 1) + COST.drafting_s(found.depth + 1)
    assert found.tokens_per_s == pytest.approx((3 + gain) / seconds)


def test_what_is_known_of_a_request_at_rest_ages_by_every_step() -> None:
    """Also by those for which its allowance was kept."""
    dear = CostModel(row_knots=(1, 512), row_s=(10e-3, 10.0), draft_knots=(8, 512), draft_s=(1.0, 2.0))
    budget = PricedBudget(dear, GAINS)
    resting = load(2)
    for one in resting.requests:
        one.worth.accepted, one.worth.promised = 3.0, 8.0
    for _ in range(100):
        assert budget.allow(resting)[0].max_tree_nodes == 1
    num_counted = budget._allowed_at
    assert num_counted > 50
    for one in resting.requests:
        assert one.worth.promised == pytest.approx(8.0 * 0.995**num_counted)
        assert one.worth.accepted == pytest.approx(3.0 * 0.995**num_counted)


def test_recorded_steps_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with trees, guesses of requests' own texts among them, as plain ones are."""
    (tmp_path / "head").mkdir()
    target = write_target(tmp_path)
    llm = LLM(**engine_options(target, write_head(tmp_path / "head", target)) | {"context_lookup": True})
    runner = make_static(llm, max_len=96)
    budget = llm.engine.scheduler.budget = PricedBudget(COST, GAINS, has_lookup=True)
    told: list[int] = []
    note = budget.learning.note

    def noted(begun: BegunStep, trees: Sequence[DraftTree], *rest: Any) -> bool:
        told.append(max(tree.num_nodes for tree in trees))
        return note(begun, trees, *rest)

    monkeypatch.setattr(budget.learning, "note", noted)
    llm.generate([[1, 2, 3] * 6, [4, 5]], SamplingParams(max_tokens=50, ignore_eos=True))
    assert runner.num_static_steps > 10
    assert len(told) >= runner.num_static_steps - 1
    assert sum(num_nodes > 1 for num_nodes in told) > 5
