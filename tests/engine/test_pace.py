"""Steps that fall behind plain ones are left out, and tried again later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jetflow_cluster import SamplingParams
from jetflow_cluster.engine.begun_steps import BegunStep
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.engine.pace import Pace, StepKind
from jetflow_cluster.engine.protocols import ScheduledRequest
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree


def _run(pace: Pace, kind: StepKind, *, times: int, tokens: int, took: float, load: int = 8) -> None:
    for _ in range(times):
        pace.observe(kind, load, tokens, took)


def _run_twice(pace: Pace, kind: StepKind, *, tokens: int, took: float) -> None:
    """Until it is judged for the second time, beside plain steps of 8 requests, each half as long as it."""
    for _ in range(2):
        _run(pace, StepKind.PLAIN, times=4, tokens=8, took=0.01)
        _run(pace, kind, times=12, tokens=tokens, took=took)


@pytest.mark.parametrize("kind", [StepKind.HEAD, StepKind.LOOKUP], ids=lambda kind: kind.value)
@pytest.mark.parametrize(("tokens", "allowed"), [(12, False), (14, False), (16, False), (17, True), (30, True)])
def test_a_kind_must_keep_the_plain_pace(kind: StepKind, tokens: int, allowed: bool) -> None:
    pace = Pace()
    _run_twice(pace, kind, tokens=tokens, took=0.02)
    assert pace.allows(kind, 8) is allowed
    assert pace.allows(kind, 6) and pace.allows(kind, 10), "other loads are not judged"


def test_what_pays_at_one_load_does_not_speak_for_another() -> None:
    pace = Pace()
    for load, took in ((12, 1.0), (16, 2.0)):
        for _ in range(3):
            _run(pace, StepKind.PLAIN, times=6, tokens=load, took=1.0, load=load)
            _run(pace, StepKind.HEAD, times=12, tokens=3 * load // 2, took=took, load=load)
    assert pace.is_ahead(StepKind.HEAD, 12) and pace.allows(StepKind.HEAD, 12)
    assert not pace.is_ahead(StepKind.HEAD, 16)
    assert [num for num in range(10, 22) if not pace.allows(StepKind.HEAD, num)] == [15, 16, 17]


def test_what_chance_may_explain_is_judged_when_more_is_known() -> None:
    pace = Pace()
    _run(pace, StepKind.PLAIN, times=4, tokens=8, took=1.0)
    _run(pace, StepKind.HEAD, times=12, tokens=31, took=4.0)
    assert pace.allows(StepKind.HEAD, 8)
    for _ in range(8):
        _run(pace, StepKind.PLAIN, times=4, tokens=8, took=1.0)
        _run(pace, StepKind.HEAD, times=40, tokens=31, took=4.0)
    assert not pace.allows(StepKind.HEAD, 8)


def test_a_single_request_may_have_bad_luck_for_a_while() -> None:
    pace = Pace()
    _run(pace, StepKind.PLAIN, times=3, tokens=1, took=0.01, load=1)
    _run(pace, StepKind.HEAD, times=95, tokens=1, took=0.02, load=1)
    assert pace.allows(StepKind.HEAD, 1)
    _run(pace, StepKind.HEAD, times=1, tokens=1, took=0.02, load=1)
    assert pace.allows(StepKind.HEAD, 1)
    _run(pace, StepKind.HEAD, times=4, tokens=1, took=0.02, load=1)
    assert pace.wants_plain(1)
    _run(pace, StepKind.PLAIN, times=4, tokens=1, took=0.01, load=1)
    _run(pace, StepKind.HEAD, times=91, tokens=1, took=0.02, load=1)
    assert pace.allows(StepKind.HEAD, 1)
    _run(pace, StepKind.HEAD, times=1, tokens=1, took=0.02, load=1)
    assert not pace.allows(StepKind.HEAD, 1)


def test_a_machine_that_was_slow_for_a_while_decides_nothing() -> None:
    """Plain steps were timed before it, so the others look bad until both are timed again."""
    pace = Pace()
    for _ in range(3):
        _run(pace, StepKind.PLAIN, times=3, tokens=8, took=0.01)
        _run(pace, StepKind.HEAD, times=12, tokens=24, took=0.09)
        assert pace.allows(StepKind.HEAD, 8)
        _run(pace, StepKind.PLAIN, times=3, tokens=8, took=0.045)
        _run(pace, StepKind.HEAD, times=12, tokens=24, took=0.09)
        assert pace.allows(StepKind.HEAD, 8)


def test_pauses_end_and_grow() -> None:
    pace = Pace()
    lengths = []
    for _ in range(7):
        _run_twice(pace, StepKind.HEAD, tokens=8, took=0.02)
        lengths.append(0)
        while not pace.allows(StepKind.HEAD, 8):
            _run(pace, StepKind.PLAIN, times=1, tokens=8, took=0.01)
            lengths[-1] += 1
    assert lengths == [256, 512, 1024, 2048, 4096, 4096, 4096]


def test_plain_steps_are_timed_first_and_now_and_then() -> None:
    pace = Pace()
    assert not pace.wants_plain(1)
    _run(pace, StepKind.HEAD, times=6, tokens=3, took=0.01, load=1)
    assert pace.wants_plain(1) and not pace.wants_plain(2)
    _run(pace, StepKind.PLAIN, times=4, tokens=1, took=0.006, load=1)
    assert not pace.wants_plain(1)
    _run(pace, StepKind.HEAD, times=191, tokens=3, took=0.01, load=1)
    assert not pace.wants_plain(1)
    _run(pace, StepKind.HEAD, times=1, tokens=3, took=0.01, load=1)
    assert pace.wants_plain(1) and pace.allows(StepKind.HEAD, 1)


def test_a_step_that_was_held_up_decides_nothing() -> None:
    pace = Pace()
    _run(pace, StepKind.PLAIN, times=3, tokens=8, took=0.01)
    _run(pace, StepKind.HEAD, times=11, tokens=20, took=0.02)
    pace.observe(StepKind.HEAD, 8, 20, 10.0)
    _run(pace, StepKind.HEAD, times=3, tokens=20, took=0.02)
    assert pace.allows(StepKind.HEAD, 8)


@pytest.mark.parametrize(("tokens", "ahead"), [(16, False), (18, True)])
def test_what_is_ahead_is_known_when_both_were_timed(tokens: int, ahead: bool) -> None:
    pace = Pace()
    _run(pace, StepKind.HEAD, times=12, tokens=tokens, took=0.02)
    assert not pace.is_ahead(StepKind.HEAD, 8)
    _run(pace, StepKind.PLAIN, times=4, tokens=8, took=0.01)
    assert pace.is_ahead(StepKind.HEAD, 8) is ahead
    assert not pace.is_ahead(StepKind.LOOKUP, 8) and not pace.is_ahead(StepKind.HEAD, 16)


def test_plain_steps_are_timed_more_often_where_little_can_be_lost() -> None:
    pace = Pace()
    _run(pace, StepKind.HEAD, times=6, tokens=20, took=0.02)
    _run(pace, StepKind.PLAIN, times=4, tokens=8, took=0.0085)
    _run(pace, StepKind.HEAD, times=31, tokens=20, took=0.02)
    assert not pace.wants_plain(8)
    _run(pace, StepKind.HEAD, times=1, tokens=20, took=0.02)
    assert pace.wants_plain(8) and pace.allows(StepKind.HEAD, 8)


COST = CostModel(row_knots=(1, 512), row_s=(1e-3, 512e-3), prompt_share=0.5)
#: A plain step of 4 takes 2 ms by it.
MEASURED = CostModel(row_knots=(1, 512), row_s=(0.5e-3, 256e-3))


def _chain(num_nodes: int) -> DraftTree:
    depths = list(range(num_nodes))
    return DraftTree(token_ids=[0] * num_nodes, parents=[d - 1 for d in depths], depths=depths, scores=[0] * num_nodes)


def _step(num_decoding: int, num_nodes: int, num_prompt_rows: int, num_draft_rows: int) -> tuple[Any, ...]:
    """A step's items, trees and paths: chains of which all is accepted."""
    request = SimpleNamespace(params=SamplingParams())
    items = [ScheduledRequest(request=request, num_rows=1, is_last=True) for _ in range(num_decoding)]
    trees = [_chain(num_nodes) for _ in items]
    paths = [AcceptedPath(nodes=list(range(num_nodes)), token_ids=[0] * num_nodes) for _ in items]
    if num_prompt_rows:
        items.append(ScheduledRequest(request=request, num_rows=num_prompt_rows, is_last=True))
        trees.append(_chain(1))
        paths.append(AcceptedPath(nodes=[0], token_ids=[0]))
    return BegunStep(items=tuple(items), num_draft_rows=num_draft_rows), trees, paths


def test_a_step_that_stands_for_others_counts_them() -> None:
    """As time: what it took and gave is one step's."""
    pace, other = Pace(), Pace()
    for each, num_like_it in ((pace, 4), (other, 1)):
        each.observe(StepKind.PLAIN, 4, 4, 1.0)
        each.observe(StepKind.LOOKUP, 4, 8, 1.0, num_like_it=num_like_it)
    ages = [each._record(StepKind.PLAIN, 6).age for each in (pace, other)]
    assert ages == [4, 1]
    assert pace._record(StepKind.LOOKUP, 6) == other._record(StepKind.LOOKUP, 6)
    assert pace._record(StepKind.LOOKUP, 6).num == 1.0


def test_steps_with_prompts_are_judged_by_what_the_prompts_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, seen = Pace(), []
    monkeypatch.setattr(pace, "observe", lambda kind, num, tokens, took, **_: seen.append((kind, num, tokens, took)))
    for nodes, prompt_rows, draft_rows in ((1, 0, 0), (3, 0, 0), (3, 16, 8), (1, 16, 0), (1, 400, 0)):
        pace.observe_step(*_step(4, nodes, prompt_rows, draft_rows), 30e-3, COST, MEASURED)
    assert seen == [
        (StepKind.PLAIN, 4, 4, pytest.approx(15.0)),
        (StepKind.LOOKUP, 4, 12, pytest.approx(15.0)),
        (StepKind.HEAD, 4, 12, pytest.approx(11.0)),
        (StepKind.PLAIN, 4, 4, pytest.approx(11.0)),
    ]
