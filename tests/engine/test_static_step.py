"""Steps on static buffers against the engine's own: the same tokens, in every bucket, and no host in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine import recorded_steps
from jetflow_cluster.engine.bucket import Bucket
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.prompt_rows import PromptNumbers
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.engine.recorded_steps import RecordedStep
from jetflow_cluster.engine.static_inputs import StaticInputs
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.types import SpeculationMode
from support.joining import requests_of, run_joining
from support.learning_budget import LearningBudget
from support.static_engines import engine_options, make_static


@pytest.fixture(scope="module")
def eager(tiny_target_dir: Path, tiny_head_dir: Path) -> LLM:
    return LLM(**engine_options(tiny_target_dir, tiny_head_dir))


@pytest.fixture
def static(tiny_target_dir: Path, tiny_head_dir: Path) -> tuple[LLM, GraphRunner]:
    llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir))
    return llm, make_static(llm)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "mixed", "filtered", "changed"])
def test_same_tokens_as_eager_steps(eager: LLM, static: tuple[LLM, GraphRunner], kind: str) -> None:
    llm, runner = static
    given = requests_of(3, kind, num=14 if kind == "changed" else 7)
    expected = run_joining(eager, given)
    found = run_joining(llm, given)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert (ours.logprobs is None) is (theirs.logprobs is None)
        for one, other in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert [t for t, _ in one.top] == [t for t, _ in other.top]
    assert runner.num_static_steps > 10
    assert runner.num_static_steps + runner.num_mixed_steps > 0.8 * llm.stats().num_steps, "few are left to eager steps"
    assert runner.num_mixed_steps > 3
    buckets = list(runner.steps.kept)
    assert any(bucket.has_changes and bucket.keeps_logits for bucket in buckets) is (kind == "changed")
    kept = [recorded.step.logits for recorded in runner.steps.kept.values() if recorded.step.logits is not None]
    assert len({logits.data_ptr() for logits in kept}) <= 1, "one room for all"
    assert (len(kept) > 1) is (kind == "changed")
    assert len({bucket.num_requests for bucket in buckets}) > 1
    assert len({bucket.num_nodes for bucket in buckets}) > 1
    assert llm.stats().num_used_pages == 0


def test_buckets_that_nobody_needs_give_way(
    eager: LLM, static: tuple[LLM, GraphRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_steps, "MAX_KEPT", 2)
    llm, runner = static
    made: list[Bucket] = []
    monkeypatch.setattr(
        recorded_steps, "StaticStep", lambda bucket, *parts: made.append(bucket) or StaticStep(bucket, *parts)
    )
    given = requests_of(4, "mixed")
    assert [o.token_ids for o in run_joining(llm, given)] == [o.token_ids for o in run_joining(eager, given)]
    assert len(runner.steps.kept) == 2
    assert len(made) > len(set(made)) > 2, "what gave way is made anew"
    assert runner.num_static_steps + runner.num_mixed_steps > len(made), "what is needed stays"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_same_tokens_where_guesses_are_right(temperature: float) -> None:
    """The embedded model, whose head is right often: paths of several nodes move K, V and draft context."""
    options = {"dtype": "float64", "draft_dtype": "float64", "num_pages": 60, "max_model_len": 96}
    options |= {"max_num_requests": 4, "context_lookup": False, "tree_nodes": {1: 1}}
    force = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=12)
    prompts = ["def quicksort(items):", "class Stack:\n    def __init__(self):"]
    params = [SamplingParams(max_tokens=20, temperature=temperature, seed=i, speculation=force) for i in range(2)]
    eager = LLM(**options)
    eager.engine.drafter.is_full_width = True
    expected = eager.generate(prompts, params)
    static = LLM(**options)
    runner = make_static(static, max_len=96)
    found = static.generate(prompts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert runner.num_static_steps > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.speculation.mean_acceptance_length > 1.2
        # The trees are the same too: the draft contexts agree.
        assert ours.speculation == theirs.speculation


def test_same_trees_with_prices_calibration_and_lookups() -> None:
    """Bit for bit, though every step's maps come from the trees and walks of the steps before."""
    repeating = "x = [1, 2, 3]\nprint(x)\n" * 4
    prompts = ["def quicksort(items):", repeating + "x = [1,", "class Stack:\n    def __init__(self):"]
    temperatures = [1.0, 0.0, 0.0]
    params = [SamplingParams(max_tokens=14 + 2 * i, temperature=t, seed=i) for i, t in enumerate(temperatures)]
    options = {"dtype": "float64", "draft_dtype": "float64", "num_pages": 80, "max_model_len": 128}
    options |= {"max_num_requests": 4, "tree_nodes": {1: 1}}
    found = []
    for is_static in (False, True):
        llm = LLM(**options)
        llm.engine.drafter.is_full_width = True
        budget = llm.engine.scheduler.budget = LearningBudget()
        runner = make_static(llm, max_len=128) if is_static else None
        records: list[StepRecord] = []
        llm.engine.on_step = records.append
        outputs = llm.generate(prompts, params)
        assert budget.num_learned > 4
        found.append((records, [o.token_ids for o in outputs], [o.speculation for o in outputs], budget.maps.tolist()))
        if runner is not None:
            assert {(b.has_head, b.has_lookup) for b in runner.steps.kept} >= {
                (True, True),
                (False, True),
                (True, False),
            }
            assert any(bucket.has_price for bucket in runner.steps.kept)
    assert found[0] == found[1]


def test_inputs_that_fail_end_their_requests_alone(
    eager: LLM, static: tuple[LLM, GraphRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is done for nobody, as other ranks may be in it already."""
    llm, runner = static
    write, num_writes, num_runs = StaticInputs.write, 0, 0

    def failing(inputs: StaticInputs, *args: object, **options: object) -> None:
        nonlocal num_writes
        num_writes += 1
        write(inputs, *args, **options)  # type: ignore[arg-type]
        if num_writes == 6:
            raise ValueError("no such number")

    run = RecordedStep.run

    def counted(step: RecordedStep, prompts: PromptNumbers | None) -> torch.Tensor | None:
        nonlocal num_runs
        num_runs += 1
        return run(step, prompts)

    monkeypatch.setattr(StaticInputs, "write", failing)
    monkeypatch.setattr(RecordedStep, "run", counted)
    given = requests_of(3, "mixed")
    made = [llm.frontend.make_request(f"r{i}", *one) for i, one in enumerate(given)]
    for request in made[:2]:
        llm.engine.add(request)
    while not any(request.error for request in made):
        llm.engine.step()
    assert num_writes == num_runs == 6
    assert llm.stats().num_used_pages == 0
    expected = [output.token_ids for output in run_joining(eager, given)]
    assert [output.token_ids for output in run_joining(llm, given)] == expected
    assert runner.num_static_steps > 10


def test_time_of_recording_is_not_the_steps(static: tuple[LLM, GraphRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, runner = static
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow:
        def record(self, launches: Callable[[], object]) -> Callable[[], object]:
            clock[0] += 100.0
            return launches

    runner.steps._recorder = Slow()
    took: list[float] = []
    monkeypatch.setattr(llm.engine.scheduler.budget, "observe", lambda *told: took.append(told[-1]))
    run_joining(llm, requests_of(3, "greedy", num=3))
    assert clock[0] >= 200.0
    assert took and max(took) == 0.0
