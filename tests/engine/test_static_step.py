"""Steps on static buffers against the engine's own: the same tokens, in every bucket, and no host in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine import recorded_steps, static_step
from jetflow_cluster.engine.bucket import Bucket
from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.device_builder import value_table
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.prompt_rows import PromptNumbers, PromptRows
from jetflow_cluster.engine.protocols import Allowance, DecodeLoad, Source, StepPlan, StepRecord
from jetflow_cluster.engine.recorded_steps import RecordedStep
from jetflow_cluster.engine.static_inputs import StaticInputs
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.engine.value_model import ValueModel
from jetflow_cluster.layers import attention
from jetflow_cluster.tree import device_tables
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SpeculationMode
from support.joining import requests_of, run_joining
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


class LearningBudget(FixedBudget):
    """Prices and calibration as mode ``auto`` has them, without a clock: the same steps give the same decisions."""

    def __init__(self) -> None:
        super().__init__(8)
        self.value = ValueModel()
        self.num_learned = self.num_steps = 0

    @property
    def maps(self) -> np.ndarray:
        return self.value.maps

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        # Every other step without the head, where those that repeat themselves guess all the same.
        self.num_steps += 1
        uses_head = self.num_steps % 2 == 0
        allowances = [replace(found, uses_head=uses_head, draft_depth=9) for found in super().allow(load)]
        return [
            replace(found, bias=40_000 * (i % 2), max_tree_nodes=16 - 9 * (i % 2)) for i, found in enumerate(allowances)
        ]

    def price_rows(self, plan: StepPlan, sources: Sequence[Source]) -> StepPlan:
        if all(source is Source.NONE for source in sources):
            return plan
        asked = sum(source is Source.HEAD for source in sources)
        return replace(plan, row_costs=1000 + 100 * asked + 30 * np.arange(plan.tree_budget + 1, dtype=np.int64))

    def price(
        self, plan: StepPlan, tables: Sequence[CandidateTable | None]
    ) -> tuple[StepPlan, Sequence[CandidateTable | None]]:
        kinds = [int(not item.request.params.is_greedy) for item in plan.items]
        sources = [
            Source.NONE if table is None else Source.HEAD if table.ids.shape[1] > 1 else Source.CHAIN
            for table in tables
        ]
        return self.price_rows(plan, sources), self.value.calibrate(tables, kinds)

    def observe(
        self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> None:
        grown = [i for i, tree in enumerate(trees) if tree.num_nodes > 1 and paths[i] is not None]
        if grown:
            kinds = [int(not plan.items[i].request.params.is_greedy) for i in grown]
            nodes = [path.nodes for i in grown if (path := paths[i]) is not None]
            self.value.observe([trees[i] for i in grown], nodes, kinds)
            self.value.refresh()
            self.num_learned += 1


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


class NoHost(TorchDispatchMode):
    """Refuses what waits for the device or depends on its values; notes every op with the shapes that it gave."""

    REFUSED = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh", "_to_cpu", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None):  # type: ignore[no-untyped-def]
        name = str(func)
        if any(refused in name for refused in self.REFUSED):
            raise AssertionError(f"{name} waits for the device")
        if name.startswith(("aten.index.", "aten.index_put")) and any(
            isinstance(i, torch.Tensor) and i.dtype is torch.bool
            for i in (args[1] or ())  # type: ignore[attr-defined]
        ):
            raise AssertionError(f"{name} by a mask has a size that depends on data")
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        shapes = [tuple(o.shape) for o in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(o, "shape")]
        self.seen.append((name, str(shapes)))
        return out


def refuse_host(monkeypatch: pytest.MonkeyPatch, guard: NoHost) -> None:
    """Reads of values by the host, and tensors made from its values, fail. The kernels stand for one launch each: what
    serves them on a CPU may look at values, and their own tests show that the launches do not."""
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, _refusing(getattr(torch.Tensor, name), name, guard))
    monkeypatch.setattr(torch, "tensor", _refusing(torch.tensor, "torch.tensor", guard))
    for name in ("build_tree", "lay_out_rows", "accept_tree", "commit_slots", "commit_kv"):
        monkeypatch.setattr(static_step, name, _one_launch(getattr(static_step, name), guard))
    monkeypatch.setattr(device_tables, "gumbel_noise", _one_launch(device_tables.gumbel_noise, guard))


def _refusing(function: Callable[..., object], name: str, guard: NoHost) -> Callable[..., object]:
    def refuse(*args: object, **options: object) -> object:
        if guard.is_on:
            raise AssertionError(f"{name}: the host looks at values, or makes some")
        return function(*args, **options)

    return refuse


def _one_launch(function: Callable[..., object], guard: NoHost) -> Callable[..., object]:
    def launch(*args: object, **options: object) -> object:
        was, guard.is_on = guard.is_on, False
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **options)
        finally:
            guard.is_on = was

    return launch


class Guarded:
    """A recorder whose replays run under `NoHost`; the first run of each step, as on CUDA, is a warm-up."""

    def __init__(self, guard: NoHost) -> None:
        self.guard = guard
        self.sequences: dict[int, set[tuple[tuple[str, str], ...]]] = {}

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        launches()

        def replay() -> None:
            self.guard.seen = []
            self.guard.is_on = True
            try:
                with self.guard:
                    launches()
            finally:
                self.guard.is_on = False
            self.sequences.setdefault(id(launches.__self__), set()).add(tuple(self.guard.seen))  # type: ignore[attr-defined]

        return replay


@pytest.mark.parametrize("kind", ["greedy", "filtered", "changed", "priced"])
def test_a_step_beside_prompts_touches_no_host(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    is_priced = kind == "priced"
    options = {"context_lookup": is_priced, "max_prompt_chunk": 6}
    llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir) | options)
    if is_priced:
        llm.engine.scheduler.budget = LearningBudget()
    runner = make_static(llm)
    guard = NoHost()
    refuse_host(monkeypatch, guard)
    # Of the prompts' attention the plan is made at the first layer, from what the host knows.
    monkeypatch.setattr(attention, "tree_attention", _one_launch(attention.tree_attention, guard))
    value_table(torch.device("cpu"))
    run, num_guarded = StaticStep.run, 0

    def run_guarded(step: StaticStep, prompts: PromptRows | None = None) -> torch.Tensor | None:
        nonlocal num_guarded
        if prompts is None:
            return run(step)
        num_guarded += 1
        guard.is_on = True
        try:
            with guard:
                return run(step, prompts)
        finally:
            guard.is_on = False

    monkeypatch.setattr(StaticStep, "run", run_guarded)
    given = requests_of(5, "greedy" if is_priced else kind, num=5)
    if is_priced:
        given = [(prompt * 3, replace(p, speculation=SpeculationOptions())) for prompt, p in given]
    run_joining(llm, given)
    assert num_guarded == runner.num_mixed_steps > 5


@pytest.mark.parametrize("kind", ["greedy", "mixed", "filtered", "changed", "priced"])
def test_a_step_touches_no_host(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    is_priced = kind == "priced"
    llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir) | {"context_lookup": is_priced})
    if is_priced:
        llm.engine.scheduler.budget = LearningBudget()
    guard = NoHost()
    recorder = Guarded(guard)
    runner = make_static(llm, recorder)
    refuse_host(monkeypatch, guard)
    given = requests_of(5, "greedy" if is_priced else kind, num=4)
    if is_priced:
        given = [(prompt * 3, replace(p, speculation=SpeculationOptions())) for prompt, p in given]
    run_joining(llm, given)
    assert runner.num_static_steps > 5
    # One bucket, one sequence of ops and sizes, whatever its batches hold.
    assert all(len(sequences) == 1 for sequences in recorder.sequences.values())
    assert max(len(next(iter(sequences))) for sequences in recorder.sequences.values()) > 100


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0]),
    ],
    ids=["item", "mask", "nonzero", "tolist", "made on the host"],
)
def test_the_guard_sees_the_host(monkeypatch: pytest.MonkeyPatch, look: Callable[[torch.Tensor], object]) -> None:
    guard = NoHost()
    refuse_host(monkeypatch, guard)
    x = torch.ones(3)
    guard.is_on = True
    try:
        with guard, pytest.raises(AssertionError):
            look(x)
    finally:
        guard.is_on = False
