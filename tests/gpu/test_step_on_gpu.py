"""What only a GPU can show of the step: replays, and what memory holds."""

from __future__ import annotations

import gc

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.planned_memory import plan_memory
from jetflow_cluster.types import FinishReason, RequestOutput

PROMPTS = [
    "def quicksort(items):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n",
    "for i in range(",
]
OPTIONS = {"context_lookup": False, "tree_nodes": {1: 24, 4: 16}, "num_pages": 400, "max_model_len": 512}


def params_of(temperature: float, mode: str = "auto", num: int = 4, max_tokens: int = 48) -> list[SamplingParams]:
    speculation = SpeculationOptions(mode=mode)
    return [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=i, speculation=speculation)
        for i in range(num)
    ]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("mode", ["auto", "force", "off"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_replayed_steps_give_the_tokens_of_eager_ones(dtype: str, temperature: float, mode: str) -> None:
    given = OPTIONS | {"device": "cuda", "dtype": dtype, "draft_dtype": dtype}
    eager = LLM(cuda_graphs=False, **given)
    graphed = LLM(**given)
    params = params_of(temperature, mode)
    expected = tokens_of(eager.generate(PROMPTS, params))
    found = tokens_of(graphed.generate(PROMPTS, params))
    runner = graphed.engine.compute.__self__
    assert isinstance(runner, GraphRunner)
    assert runner.num_static_steps > 5
    assert found == expected
    # The same graphs again, for other requests.
    again = [PROMPTS[i] for i in (2, 0)]
    assert tokens_of(graphed.generate(again, params[:2])) == tokens_of(eager.generate(again, params[:2]))


def test_lookups_in_replayed_steps_change_no_token() -> None:
    given = OPTIONS | {"device": "cuda", "dtype": "float64", "draft_dtype": "float64", "context_lookup": True}
    repeating = ["x = [1, 2, 3]\nprint(x)\n" * 4 + "x = [1,", *PROMPTS[:2]]
    params = params_of(0.0, num=3)
    eager, graphed = LLM(cuda_graphs=False, **given), LLM(**given)
    expected, found = (llm.generate(repeating, params) for llm in (eager, graphed))
    assert tokens_of(found) == tokens_of(expected)
    assert [o.speculation for o in found] == [o.speculation for o in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_nothing_but_the_outcome_is_waited_for(temperature: float) -> None:
    """Requests come in one by one, so that prompts stand beside trees. The second time every bucket is there."""
    llm = LLM(device="cuda", dtype="float32", **OPTIONS)
    engine, runner = llm.engine, llm.engine.compute.__self__
    assert isinstance(runner, GraphRunner)
    for is_strict in (False, True):
        waiting = [
            llm.frontend.make_request(*one)
            for one in zip(("a", "b", "c"), PROMPTS, params_of(temperature), strict=False)
        ]
        before = (runner.num_static_steps, runner.num_mixed_steps)
        while waiting or engine.has_work:
            if waiting:
                engine.add(waiting.pop(0))
            # An event's end is waited for all the same; this refuses waits for all that is queued.
            torch.cuda.set_sync_debug_mode("error" if is_strict else "default")
            try:
                deltas = engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(delta.finish_reason is not FinishReason.ERROR for delta in deltas)
        assert runner.num_static_steps > before[0] + 5
        assert runner.num_mixed_steps >= before[1] + 3


def test_auto_learns_from_replayed_steps() -> None:
    llm = LLM(device="cuda", dtype="float32", num_pages=400, max_model_len=512)
    outputs = llm.generate(PROMPTS, params_of(0.0, max_tokens=96))
    assert sum(output.usage.completion_tokens for output in outputs) > 96
    assert llm.stats().num_late_compilations == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_was_planned(dtype: str) -> None:
    # Engines of tests before this one refer to themselves.
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    given = OPTIONS | {"device": "cuda", "dtype": dtype}
    plan = plan_memory(EngineConfig(**{k: v for k, v in given.items() if k != "tree_nodes"}))
    llm = LLM(**given)
    lines = {line.name: line.num_bytes for line in plan.lines()}
    held = ("embedding", "lm_head", "target", "draft head", "side-car", "KV pages", "draft KV pages")
    loaded = torch.cuda.memory_allocated() - before
    # The allocator rounds every tensor up to 512 bytes.
    assert sum(lines.get(name, 0) for name in held) == pytest.approx(loaded, rel=0.02)
    llm.generate(PROMPTS, params_of(0.0))
    assert torch.cuda.max_memory_allocated() - before <= plan.total_bytes
