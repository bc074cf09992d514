"""Guesses from a request's own text: the same tokens, fewer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.protocols import StepPlan, StepRecord
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH
from jetflow_cluster.types import RequestOutput
from support.adversaries import NoDrafter

PROMPTS = [[5, 9, 3, 17] * 12, list(range(40)), [7], [1, 2, 3] * 20 + [4] + [1, 2]]
#: A text that repeats one token.
LOOP: dict[str, Any] = {"max_tokens": 200, "logit_bias": {17: 100.0}}
OPTIONS: dict[str, Any] = {"dtype": "float64", "num_pages": 96, "page_size": 8, "tree_nodes": {1: 8}}


@pytest.fixture(scope="module")
def engines(tiny_target_dir: Path, tiny_head_dir: Path) -> dict[bool, LLM]:
    """With and without lookup; the head is random, so that what is accepted comes from the text."""
    return {on: LLM(str(tiny_target_dir), str(tiny_head_dir), context_lookup=on, **OPTIONS) for on in (True, False)}


def generate(llm: LLM, mode: str = "force", **params: Any) -> list[RequestOutput]:
    limits = {name: params.pop(name) for name in ("max_tree_nodes", "max_depth") if name in params}
    sampling = SamplingParams(
        **({"max_tokens": 80, "temperature": 0.0, "ignore_eos": True} | params),
        speculation=SpeculationOptions(mode=mode, **limits),
    )
    return llm.generate(PROMPTS, sampling)


def steps_of(llm: LLM, **params: Any) -> list[StepRecord]:
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    try:
        generate(llm, **params)
    finally:
        llm.engine.on_step = None
    return records


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"repetition_penalty": 1.3, "frequency_penalty": 0.4}, id="penalties"),
        pytest.param({"temperature": 0.8, "seed": 5}, id="sampled"),
        pytest.param({"max_tree_nodes": 64}, id="large-trees"),
        pytest.param({"max_tree_nodes": 2}, id="one-guess"),
        pytest.param({"max_depth": 3}, id="shallow"),
        pytest.param({"stop_token_ids": [11]}, id="stops"),
    ],
)
def test_same_tokens(engines: dict[bool, LLM], params: dict[str, Any]) -> None:
    found = generate(engines[True], **params)
    plain = generate(engines[False], mode="off", **params)
    assert [o.token_ids for o in found] == [o.token_ids for o in plain]
    assert [o.finish_reason for o in found] == [o.finish_reason for o in plain]


def test_repetitions_are_taken_in_few_steps(engines: dict[bool, LLM]) -> None:
    by_lookup, by_head = (generate(engines[on], **LOOP) for on in (True, False))
    assert sum(o.speculation.num_steps for o in by_lookup) < 0.3 * sum(o.speculation.num_steps for o in by_head)


def test_requests_that_sample_are_left_to_the_drafter(engines: dict[bool, LLM]) -> None:
    found, plain = (
        [o.speculation.num_steps for o in generate(engines[on], temperature=1.0, seed=3)] for on in (True, False)
    )
    assert found == plain


@pytest.mark.parametrize(("max_depth", "expected"), [(None, MAX_LOOKUP_DEPTH), (5, 5)])
def test_depth_of_trees(engines: dict[bool, LLM], max_depth: int | None, expected: int) -> None:
    records = steps_of(engines[True], max_tree_nodes=40, max_depth=max_depth, **LOOP)
    assert max(max(entry.tree.depths) for record in records for entry in record.requests) == expected


class CountingDrafter(NoDrafter):
    """Counts the requests that it is asked about."""

    num_asked = 0

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        self.num_asked += sum(item.max_tree_nodes > 1 for item in plan.items)
        return super().draft(plan)


def test_long_matches_spare_the_drafter(tiny_target_dir: Path) -> None:
    drafter = CountingDrafter()
    llm = LLM(str(tiny_target_dir), drafter_factory=lambda *_: drafter, **OPTIONS)
    outputs = generate(llm, **LOOP)
    num_steps = sum(o.speculation.num_steps for o in outputs)
    assert sum(o.speculation.num_accepted_tokens for o in outputs) > 400
    assert drafter.num_asked < 0.8 * num_steps
    assert [o.token_ids for o in outputs] == [o.token_ids for o in generate(llm, mode="off", **LOOP)]
