"""Recorded steps of requests whose draft context does not begin with their first token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jetflow_cluster import LLM, SpeculationOptions
from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.protocols import Allowance, DecodeLoad, StepRecord
from support.joining import requests_of, run_joining
from support.static_engines import engine_options, make_static


class GapBudget(FixedBudget):
    """For some steps nobody's draft context is kept, as under a load that no tree pays at."""

    def __init__(self) -> None:
        super().__init__(10)
        self.num_steps = 0

    @property
    def is_paused(self) -> bool:
        return 4 <= self.num_steps < 9

    @property
    def keeps_context(self) -> bool:  # type: ignore[override]
        return not self.is_paused

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        self.num_steps += 1
        if self.is_paused:
            return [Allowance(keeps_context=False) for _ in load.requests]
        return super().allow(load)


@pytest.mark.parametrize(("kind", "has_lookup"), [("mixed", False), ("greedy", True)], ids=["head", "lookup"])
def test_same_trees_behind_gaps_of_the_draft_context(
    tiny_target_dir: Path, tiny_head_dir: Path, kind: str, has_lookup: bool
) -> None:
    given = [
        (prompt * 3, replace(params, max_tokens=28, ignore_eos=True, speculation=SpeculationOptions()))
        for prompt, params in requests_of(8, kind, num=4)
    ]
    found = []
    for is_static in (False, True):
        llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir) | {"context_lookup": has_lookup})
        llm.engine.drafter.is_full_width = True
        llm.engine.scheduler.budget = GapBudget()
        runner = make_static(llm, max_len=96) if is_static else None
        records: list[StepRecord] = []
        llm.engine.on_step = records.append
        outputs = run_joining(llm, given)
        # Guesses of texts reach no further than a context that begins anew, so those trees are shorter.
        trees = [] if has_lookup else [records, [output.speculation for output in outputs]]
        found.append(([output.token_ids for output in outputs], trees))
        if runner is not None:
            assert any(bucket.has_gaps for bucket in runner.steps.kept)
            num_eager = llm.stats().num_steps - runner.num_static_steps - runner.num_mixed_steps
            assert num_eager <= 2 * len(given), "only where a context begins"
    assert found[0] == found[1]
