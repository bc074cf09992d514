"""Policies of tree sizes: given ones, and what warm-up makes."""

from __future__ import annotations

import logging

import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.budget import BudgetTable
from jetflow_cluster.engine.priced_budget import PricedBudget


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
        llm = LLM(
            tiny_target,
            tiny_head,
            dtype="float32",
            num_pages=256,
            page_size=8,
            max_num_requests=4,
            context_lookup=False,
        )
    assert isinstance(llm.engine.scheduler.budget, PricedBudget)
    stats = llm.stats()
    assert (stats.num_free_pages, stats.num_steps, stats.num_generated_tokens) == (256, 0, 0)
    # A random head guesses nothing: the self-test says so, and nothing is drafted.
    assert "probably untrained" in caplog.text
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert output.speculation.num_draft_nodes == 0
    assert llm.stats().speculation_reason in ("head", "load")
