"""Two cohorts in flight: workers guess for one half of the requests while the other is verified. No token changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jetflow_cluster import SamplingParams, SpeculationOptions
from jetflow_cluster.engine.budget import BudgetTable
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.draft_choice import NODES, Gains, Situation, choose
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import DecodeLoad, StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import FinishReason
from support.draft_workers import RemoteHeads, kill, wait_for

NUM_REQUESTS = 14


class TwoCohorts(BudgetTable):
    """Given trees, in two cohorts wherever two requests draft."""

    has_cohorts = True


def requests_of(llm: Any, seed: int) -> list[Request]:
    rng, made = random.Random(seed), []
    for i in range(NUM_REQUESTS):
        mode = rng.choice(["auto", "auto", "auto", "force", "off"])
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 17, 60]),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            seed=i,
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([(), (17, 60, 61)]),
            repetition_penalty=1.2 if i == 7 else 1.0,
            speculation=SpeculationOptions(mode=mode, max_tree_nodes=rng.choice([None, 4])),
        )
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 60))] * rng.choice([1, 1, 2])
        made.append(llm.frontend.make_request(f"r{seed}-{i}", prompt, params))
    return made


def run(llm: Any, seed: int, *, abort_share: float = 0.0) -> list[Request]:
    """All requests, some at a time, of which some are aborted between and within steps."""
    engine, rng = llm.engine, random.Random(seed)
    requests = requests_of(llm, seed)
    waiting = list(requests)

    def disturb() -> None:
        if engine.requests and rng.random() < abort_share:
            engine.abort(rng.choice(list(engine.requests)))

    engine.while_computing = disturb
    while waiting or engine.has_work:
        while waiting and (rng.random() < 0.6 or not engine.has_work):
            engine.add(waiting.pop(0))
        engine.step()
        disturb()
        engine.pool.check()
    return requests


def check_same(found: Sequence[Request], expected: Sequence[Request]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.error is None
        if ours.finish_reason is FinishReason.ABORT:
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
        else:
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)


@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (1, {}),
        (2, {"context_lookup": True}),
        (1, {"num_pages": 14, "max_num_requests": 6}),
        (2, {"max_prompt_chunk": 16, "max_num_batched_tokens": 64, "context_lookup": True}),
    ],
    ids=["one-worker", "two-workers-and-lookup", "few-pages", "chunks"],
)
def test_no_token_depends_on_it(setup: RemoteHeads, num_workers: int, options: dict[str, Any]) -> None:
    options = {"num_pages": 64} | options
    plain = setup.llm(**options)
    llm = setup.llm(**options)
    for i in range(num_workers):
        setup.start_worker(f"w{i}")
    wait_for(setup, num_workers)
    llm.engine.scheduler.budget = TwoCohorts({1: 16, 4: 6})
    for seed in range(2):
        expected = run(plain, seed)
        check_same(run(llm, seed), expected)
        check_same(run(llm, seed, abort_share=0.15), expected)
    stats = llm.stats()
    # Where pages are scarce few requests run at a time.
    assert stats.num_overlapped_steps > stats.num_steps / 10
    assert stats.num_drafted_steps > stats.num_overlapped_steps / 2
    assert stats.num_used_pages == 0
    assert plain.stats().num_drafted_steps == 0
    if options["num_pages"] < 64:
        assert stats.num_preemptions > 0


def test_every_request_takes_its_turn_and_guesses_are_asked_for_before_others_are_verified(setup: RemoteHeads) -> None:
    llm = setup.llm()
    setup.start_worker("w")
    wait_for(setup, 1)
    engine, drafter = llm.engine, setup.drafters[-1]
    engine.scheduler.budget = TwoCohorts({8: 8})
    plans: list[StepPlan] = []
    events: list[str] = []
    schedule, ask, verify = engine.scheduler.schedule, drafter.ask, engine.target.verify

    def noted_schedule() -> StepPlan:
        plans.append(schedule())
        return plans[-1]

    def noted_ask(plan: StepPlan) -> None:
        events.append("ask")
        ask(plan)

    def noted_verify(*args: Any) -> Any:
        events.append("verify")
        return verify(*args)

    engine.scheduler.schedule, drafter.ask, engine.target.verify = noted_schedule, noted_ask, noted_verify
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    llm.generate([[i, i + 1, i + 2] for i in range(7)], params)
    both = [i for i, plan in enumerate(plans) if plan.ahead]
    assert len(both) > 6
    for i in both:
        decoding = {item.request for item in plans[i].items if item.num_rows == 1}
        assert not decoding & set(plans[i].resting)
        ahead = {item.request for item in plans[i].ahead}
        assert ahead <= set(plans[i].resting)
        # Who was asked about decodes next, and nobody is asked about twice.
        assert ahead <= {item.request for item in plans[i + 1].items}
    # One question per step, but for the first, when nothing had been asked ahead.
    first = events.index("verify", events.index("ask"))
    steady = events[first:]
    assert steady[: 2 * 6] == ["verify", "ask"] * 6
    assert [len(plans[i].items) for i in both[:6]] == [4, 3] * 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_lost_with_a_question_open_costs_no_token(setup: RemoteHeads, num_workers: int) -> None:
    plain, llm = setup.llm(), setup.llm()
    workers = [setup.start_worker(f"w{i}") for i in range(num_workers)]
    wait_for(setup, num_workers)
    drafter = setup.drafters[-1]
    llm.engine.scheduler.budget = TwoCohorts({8: 16})
    expected = run(plain, 5)

    def lose(_: object) -> None:
        if llm.engine.num_steps >= 9 and drafter._asked and len(workers) == num_workers:
            kill(workers.pop())

    llm.engine.on_step = lose
    check_same(run(llm, 5), expected)
    assert len(workers) == num_workers - 1
    assert drafter.num_workers == num_workers - 1
    assert drafter.epoch == (1 if num_workers == 1 else 0)
    # One that comes while a question is open joins behind its answer.
    setup.start_worker("late")
    wait_for(setup, num_workers)
    before = llm.stats().num_drafted_steps
    check_same(run(llm, 6), run(plain, 6))
    assert llm.stats().num_drafted_steps > before


def test_a_newcomer_joins_behind_the_answer(setup: RemoteHeads) -> None:
    plain, llm = setup.llm(), setup.llm()
    setup.start_worker("first")
    wait_for(setup, 1)
    drafter = setup.drafters[-1]
    drafter.pages_in_use = llm.engine.pages_with_draft_context
    llm.engine.scheduler.budget = TwoCohorts({8: 16})
    has_joined = False

    def join(_: object) -> None:
        nonlocal has_joined
        if llm.engine.num_steps >= 9 and drafter._asked and not has_joined:
            has_joined = True
            setup.start_worker("second")

    llm.engine.on_step = join
    check_same(run(llm, 5), run(plain, 5))
    assert drafter.num_workers == 2
    assert drafter.epoch == 0


def test_a_step_that_fails_leaves_those_that_rest(setup: RemoteHeads) -> None:
    plain, llm = setup.llm(), setup.llm()
    setup.start_worker("w")
    wait_for(setup, 1)
    engine = llm.engine
    engine.scheduler.budget = TwoCohorts({8: 8})
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    expected = plain.generate(prompts, params)
    requests = [llm.frontend.make_request(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    verify = engine.target.verify
    while engine.has_work and not engine.scheduler._asked:
        engine.step()

    def fail(*args: Any) -> Any:
        engine.target.verify = verify
        raise RuntimeError("no such chip")

    engine.target.verify = fail
    while engine.has_work:
        engine.step()
    failed = [request for request in requests if request.finish_reason is FinishReason.ERROR]
    assert len(failed) == 3
    for request, output in zip(requests, expected, strict=True):
        if request not in failed:
            assert request.output().token_ids == output.token_ids
    assert llm.stats().num_used_pages == 0


#: Where drafting takes longer than what a pass of the target takes at least, two halves cost less than the whole.
BY_ROWS = CostModel(row_knots=(1, 512), row_s=(2e-3, 17e-3), draft_knots=(1, 512), draft_s=(1.5e-3, 40e-3))
#: Where times hardly grow with rows, they cost nearly twice as much.
FLAT = CostModel(row_knots=(1, 512), row_s=(10e-3, 10.5e-3), draft_knots=(1, 512), draft_s=(2e-3, 2.1e-3))
GAINS = Gains(accepted=np.minimum(np.arange(1.0, 8.0)[None], np.log2(NODES)[:, None]) * 0.9, sampled_share=0.8)


def decided(llm: Any, cost: CostModel, num: int, *, may_overlap: bool = True) -> PricedBudget:
    budget = PricedBudget(cost, GAINS, may_overlap=may_overlap)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    requests = [llm.frontend.make_request(f"r{i}", [1, 2, 3], params) for i in range(num)]
    budget.allow(DecodeLoad(requests=requests, num_decoding=num, fair_nodes=32))
    return budget


def test_the_policy_decides_by_what_was_measured(setup: RemoteHeads) -> None:
    llm = setup.llm()
    assert decided(llm, BY_ROWS, 8).is_on
    assert decided(llm, BY_ROWS, 8).has_cohorts
    assert not decided(llm, BY_ROWS, 8, may_overlap=False).has_cohorts
    assert not decided(llm, BY_ROWS, 1).has_cohorts
    assert decided(llm, FLAT, 8).is_on
    assert not decided(llm, FLAT, 8).has_cohorts


def test_the_choice_is_the_best_of_one_and_two_cohorts() -> None:
    situation = Situation(num_requests=8, num_context_tokens=0, num_prompt_rows=0, max_nodes=64, num_block_slots=None)
    found = choose(BY_ROWS, GAINS, np.ones(8), situation, cohort_share=1.0)
    rates = {}
    for k, nodes in enumerate(NODES):
        for depth in range(1, 8):
            verify_s = BY_ROWS.plain_s(4, 0) + BY_ROWS.trees_s(4, 4 * (nodes - 1))
            step_s = max(verify_s, BY_ROWS.drafting_s(4 * (depth + 1)))
            rates[nodes, depth] = 8 * (1 + GAINS.accepted[k, depth - 1]) / (2 * step_s)
    best = max(rates.values())
    assert found.num_cohorts == 2
    assert found.tokens_per_s == pytest.approx(best)
    assert rates[found.num_nodes, found.depth] == pytest.approx(best)
    alone = choose(BY_ROWS, GAINS, np.ones(8), situation)
    assert (alone.num_cohorts, alone.tokens_per_s < best) == (1, True)
    # Where some may not draft there are no halves of all.
    assert choose(BY_ROWS, GAINS, np.ones(7), situation, cohort_share=1.0).num_cohorts == 1


def test_an_overlapped_step_costs_the_longer_of_both() -> None:
    verify = StepShape(num_requests=4, num_rows=32, num_context_tokens=0)
    alone_s = BY_ROWS.step_s(verify)
    for num_draft_rows in (4, 32, 400):
        draft_s = BY_ROWS.drafting_s(num_draft_rows)
        shape = StepShape(num_requests=4, num_rows=32, num_draft_rows=num_draft_rows, is_overlapped=True)
        assert BY_ROWS.step_s(shape) == pytest.approx(max(alone_s, draft_s))
        one_by_one = StepShape(num_requests=4, num_rows=32, num_draft_rows=num_draft_rows)
        assert BY_ROWS.step_s(one_by_one) == pytest.approx(alone_s + draft_s)
        prices = BY_ROWS.row_costs(shape, 64) * 1e-7
        assert prices[32] == pytest.approx(max(alone_s, draft_s), abs=2e-7)
        assert (np.diff(prices) >= 0).all()


def test_the_engine_chooses_cohorts_and_its_steps_are_learned_from(setup: RemoteHeads) -> None:
    plain, llm = setup.llm(), setup.llm()
    setup.start_worker("w")
    wait_for(setup, 1)
    llm.engine.scheduler.budget = budget = PricedBudget(BY_ROWS, GAINS, may_overlap=True)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    expected = plain.generate(prompts, params)
    assert [o.token_ids for o in llm.generate(prompts, params)] == [o.token_ids for o in expected]
    assert llm.stats().num_overlapped_steps > 3
    budget.learning.catch_up()
    assert llm.stats().num_steps > 40
    assert budget.cost is not BY_ROWS
