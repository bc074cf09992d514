"""What a request says about speculation is kept: off, limits of nodes and depth, and what `auto` may do."""

from __future__ import annotations

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.protocols import StepRecord


def _llm(target: str, head: str, nodes: dict[int, int]) -> LLM:
    return LLM(target, head, dtype="float64", num_pages=128, page_size=8, tree_nodes=nodes, max_num_batched_tokens=64)


def _steps(llm: LLM, prompts: list[list[int]], options: SpeculationOptions) -> list[StepRecord]:
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, speculation=options))
    return records


@pytest.mark.parametrize("nodes", [2, 3, 9, 32])
@pytest.mark.parametrize("depth", [1, 3, None], ids=str)
def test_force_keeps_both_limits(tiny_target: str, tiny_head: str, nodes: int, depth: int | None) -> None:
    llm = _llm(tiny_target, tiny_head, {1: 1})
    options = SpeculationOptions(mode="force", max_tree_nodes=nodes, max_depth=depth)
    trees = [entry.tree for step in _steps(llm, [[1, 2, 3]], options) for entry in step.requests]
    # One depth has 16 candidates at most.
    assert max(tree.num_nodes for tree in trees) == (min(nodes, 17) if depth == 1 else nodes)
    assert max(max(tree.depths) for tree in trees) <= (depth or 7)
    for tree in trees:
        tree.validate()


@pytest.mark.parametrize(("mode", "nodes"), [("off", {1: 16}), ("auto", {1: 1})], ids=["switched-off", "does-not-pay"])
def test_without_speculation_nothing_is_drafted(
    tiny_target: str, tiny_head: str, monkeypatch: pytest.MonkeyPatch, mode: str, nodes: dict[int, int]
) -> None:
    llm = _llm(tiny_target, tiny_head, nodes)

    def fail(*args: object) -> None:
        raise AssertionError("the head ran")

    monkeypatch.setattr(llm.engine.drafter, "draft", fail)
    if mode == "off":
        # `auto` keeps the draft context of shared pages whole, in bulk when a request ends; `off` runs no head code.
        monkeypatch.setattr(llm.engine.drafter, "fuse", fail)
        monkeypatch.setattr(llm.engine.drafter, "absorb", fail)
    trees = [e.tree for s in _steps(llm, [[1, 2, 3]], SpeculationOptions(mode=mode)) for e in s.requests]
    assert {tree.num_nodes for tree in trees} == {1}


def test_trees_of_a_step_share_its_budget(tiny_target: str, tiny_head: str) -> None:
    llm = _llm(tiny_target, tiny_head, {1: 8, 4: 6})
    records = _steps(llm, [[i, i + 1, i + 2] for i in range(4)], SpeculationOptions(mode="auto"))
    full = [step for step in records if len(step.requests) == 4 and all(e.tree.num_nodes > 1 for e in step.requests)]
    assert full
    for step in full:
        sizes = [entry.tree.num_nodes for entry in step.requests]
        assert sum(sizes) <= 4 * 6
        assert max(sizes) <= 12


def test_auto_keeps_the_request_s_own_limit(tiny_target: str, tiny_head: str) -> None:
    llm = _llm(tiny_target, tiny_head, {4: 16})
    options = SpeculationOptions(mode="auto", max_tree_nodes=3)
    for step in _steps(llm, [[i, i + 1] for i in range(4)], options):
        assert all(entry.tree.num_nodes <= 3 for entry in step.requests)
