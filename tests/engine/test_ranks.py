"""An engine over several processes gives the tokens of an engine in one."""

from __future__ import annotations

from pathlib import Path

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from support.rank_engines import run_on_ranks
from support.small_models import write_head, write_target

PROMPTS = [[1, 2, 3], list(range(40, 75)), [7] * 20, [200], list(range(100, 163))]


def params(i: int) -> SamplingParams:
    sampled = {"temperature": 0.8, "top_p": 0.9} if i % 2 else {"temperature": 0.0}
    options = SpeculationOptions(mode="force" if i % 3 else "off", max_tree_nodes=16)
    return SamplingParams(max_tokens=12, seed=i, ignore_eos=True, speculation=options, **sampled)


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
    found = run_on_ranks(config, 4, PROMPTS, several, tmp_path)
    assert found.token_ids == expected
    assert found.buckets == []
