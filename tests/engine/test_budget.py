"""Tree sizes from costs: as large as pays, none where nothing does."""

from __future__ import annotations

import logging

import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.budget import BudgetTable

ACCEPTANCE = {1: 1.0, 8: 2.5, 16: 3.0, 32: 3.5}


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [
        ({1: 1.0, 8: 1.1, 16: 1.2, 32: 1.5}, 16),
        ({1: 1.0, 8: 1.1, 16: 1.2, 32: 1.3}, 32),
        ({1: 1.0, 8: 2.45, 16: 3.5, 32: 7.0}, 1),
        ({1: 1.0, 8: 2.0, 16: 4.0, 32: 8.0}, 8),
        # The machine was busy while trees of one node were measured.
        ({1: 9.0, 8: 3.0, 16: 3.5, 32: 7.0}, 16),
        ({1: 9.0, 8: 9.0, 16: 9.0, 32: 3.6}, 32),
        ({1: 1.0}, 1),
    ],
    ids=["middle", "largest", "gain-within-noise", "small", "noise", "noise-but-one", "nothing-measured"],
)
def test_the_best_rate_wins(step_s: dict[int, float], expected: int) -> None:
    assert BudgetTable.from_costs({4: step_s}, ACCEPTANCE).nodes_by_running == {4: expected}


def test_noise_does_not_turn_speculation_on() -> None:
    worthless = dict.fromkeys((1, 8, 16), 1.02)
    assert BudgetTable.from_costs({1: {1: 9.0, 8: 1.2, 16: 1.5}}, worthless).nodes_by_running == {1: 1}


@pytest.mark.parametrize(
    ("num_decoding", "expected"), [(1, 32), (2, 16), (3, 8), (4, 8), (5, 6), (8, 4), (100, 1)], ids=str
)
def test_lookup(num_decoding: int, expected: int) -> None:
    table = BudgetTable({4: 8, 1: 32, 2: 16})
    assert table.nodes_per_tree(num_decoding) == expected


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BudgetTable({})


def test_warm_up_measures_a_table_and_leaves_nothing(
    tiny_target: str, tiny_head: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        llm = LLM(tiny_target, tiny_head, dtype="float32", num_pages=256, page_size=8, max_num_requests=4)
    table = llm.engine.scheduler.budget
    assert isinstance(table, BudgetTable)
    assert set(table.nodes_by_running) == {1, 2, 4}
    stats = llm.stats()
    assert (stats.num_free_pages, stats.num_steps, stats.num_generated_tokens) == (256, 0, 0)
    # A random head guesses nothing: the self-test says so, and speculation stays off.
    assert "probably untrained" in caplog.text
    assert set(table.nodes_by_running.values()) == {1}
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert output.speculation.num_draft_nodes == 0
