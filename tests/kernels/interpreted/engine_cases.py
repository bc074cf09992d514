"""An engine whose trees and walks come from the kernels; see `test_interpreted.py` for how these run."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.choice import accept_on_host
from jetflow_cluster.engine.device_acceptance import accept_on_device
from jetflow_cluster.engine.device_builder import build_trees_on_device
from jetflow_cluster.engine.trees import build_planned_trees

PROMPTS = ["def add(a, b):\n    return a", "for i in range(", "class Stack:\n    def push(", "import os\nimport "]
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "presence_penalty": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.2, "min_tokens": 8},
    {"temperature": 1.0, "min_p": 0.05, "logit_bias": {100: 1.0}},
]


def parameters(mode: str) -> list[SamplingParams]:
    limits = SpeculationOptions(mode=mode, max_tree_nodes=10)
    return [SamplingParams(max_tokens=9, seed=i, speculation=limits, **options) for i, options in enumerate(OPTIONS)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    # From graphs, trees and walks are the kernels' whatever stands here.
    return LLM(dtype="float64", tree_nodes={4: 10}, num_pages=128, cuda_graphs=False)


def test_tokens_are_those_of_the_host(llm: LLM) -> None:
    engine = llm.engine
    assert engine.acceptor is accept_on_device
    assert isinstance(engine.tree_builder, partial)
    by_kernels = llm.generate(PROMPTS, parameters("force"))
    one_by_one = llm.generate(PROMPTS, parameters("off"))
    engine.acceptor, engine.tree_builder = accept_on_host, build_planned_trees
    by_host = llm.generate(PROMPTS, parameters("force"))
    assert [o.token_ids for o in by_kernels] == [o.token_ids for o in by_host] == [o.token_ids for o in one_by_one]
    accepted = [o.speculation.accepted_per_step for o in by_kernels]
    assert accepted == [o.speculation.accepted_per_step for o in by_host]
    assert [o.speculation.num_draft_nodes for o in by_kernels] == [o.speculation.num_draft_nodes for o in by_host]
    assert sum(o.speculation.num_accepted_tokens for o in by_kernels) > 4


def test_what_has_no_room_is_built_on_the_host(device: str) -> None:
    limits = {"max_nodes": [5, 1], "max_depths": [2, 0]}
    trees = build_trees_on_device([None, None], [3, 4], **limits, device=torch.device(device))
    assert [tree.token_ids for tree in trees] == [[3], [4]]
