"""An engine over several processes gives the tokens of an engine in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from support.joining import requests_of
from support.rank_engines import run_on_ranks
from support.small_models import write_head, write_target

PROMPTS = [[1, 2, 3], list(range(40, 75)), [7] * 20, [200], list(range(100, 163))]


def params(i: int) -> SamplingParams:
    sampled = {"temperature": 0.8, "top_p": 0.9} if i % 2 else {"temperature": 0.0}
    options = SpeculationOptions(mode="force" if i % 3 else "off", max_tree_nodes=16)
    return SamplingParams(max_tokens=24, seed=i, ignore_eos=True, speculation=options, **sampled)


def test_ranks_together_give_the_tokens_of_one(tmp_path: Path) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    config = EngineConfig(model=str(target), draft_head=str(head), dtype="float64", num_pages=64)
    llm = LLM(str(target), str(head), dtype="float64", num_pages=64, tree_nodes={1: 16})
    several = [params(i) for i in range(len(PROMPTS))]
    expected = [o.token_ids for o in llm.generate(PROMPTS, several)]
    assert run_on_ranks(config, 4, PROMPTS, several, tmp_path) == expected


def test_same_tokens_on_static_buffers(tmp_path: Path) -> None:
    """Trees of the head and of requests' own texts, prompts beside them, and steps of separate passes in between."""
    target, head = tmp_path / "target", tmp_path / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    options = {"dtype": "float64", "draft_dtype": "float64", "num_pages": 64, "max_prompt_chunk": 9}
    prompts, params = zip(*requests_of(6, "changed", num=6), strict=True)
    prompts = [prompt * 3 for prompt in prompts]
    params = [*params[:-1], replace(params[-1], prompt_logprobs=1)]
    expected = LLM(str(target), str(head), tree_nodes={1: 16}, **options).generate(prompts, params)
    config = EngineConfig(model=str(target), draft_head=str(head), **options)
    found = run_on_ranks(config, 2, prompts, params, tmp_path, is_static=True)
    assert found == [output.token_ids for output in expected]
