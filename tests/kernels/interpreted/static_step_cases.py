"""Steps on static buffers with every kernel in them, beside the engine's own; see `test_interpreted.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.graph_runner import GraphRunner
from support.small_models import write_head, write_target
from support.static_engines import make_static

PROMPTS = [[5, 17, 9], [40, 41, 42, 43, 44]]
#: What the two requests ask for.
KINDS = {
    "greedy": [{"temperature": 0.0}, {"temperature": 0.0}],
    "mixed": [{"temperature": 0.0}, {"temperature": 1.0}],
    "filtered": [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02}],
    "changed": [
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "frequency_penalty": 0.5, "logit_bias": {3: 4.0}, "stop_token_ids": (3,), "min_tokens": 2},
    ],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = write_target(tmp_path_factory.mktemp("target"), dtype=torch.float32, num_layers=2, max_len=64, head_dim=64)
    return target, write_head(tmp_path_factory.mktemp("head"), target, block_size=4)


def make_llm(folders: tuple[Path, Path], dtype: str, device: str) -> LLM:
    options = {"dtype": dtype, "draft_dtype": dtype, "device": device, "num_pages": 16, "page_size": 16}
    options |= {"max_num_requests": 2, "context_lookup": False, "cuda_graphs": False}
    return LLM(str(folders[0]), str(folders[1]), tree_nodes={1: 1}, **options)


@pytest.mark.parametrize(
    ("dtype", "kind", "max_tokens"),
    [("float64", "greedy", 5), ("float64", "mixed", 7), ("float32", "filtered", 3), ("float64", "changed", 4)],
)
def test_same_tokens_and_trees(
    folders: tuple[Path, Path], device: str, dtype: str, kind: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force = SpeculationOptions(mode="force", max_tree_nodes=18)
    params = [
        SamplingParams(max_tokens=max_tokens, seed=5 + i, ignore_eos=True, speculation=force, **options)
        for i, options in enumerate(KINDS[kind])
    ]
    with monkeypatch.context() as patch:
        # In the interpreter's place plain torch, step by step.
        patch.delenv("TRITON_INTERPRET", raising=False)
        expected = make_llm(folders, dtype, device).generate(PROMPTS, params)
    llm = make_llm(folders, dtype, device)
    runner = make_static(llm)
    assert isinstance(runner, GraphRunner)
    found = llm.generate(PROMPTS, params)
    assert runner.num_static_steps > 1
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.speculation for o in found] == [o.speculation for o in expected]
    assert kind != "mixed" or any(o.speculation.num_accepted_tokens for o in found)
