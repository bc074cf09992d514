"""Steps on static buffers look at no value and take nothing from the host, so that a graph may hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jetflow_cluster import LLM, SpeculationOptions
from jetflow_cluster.engine import static_step
from jetflow_cluster.engine.device_builder import value_table
from jetflow_cluster.engine.prompt_rows import PromptRows
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.layers import attention
from jetflow_cluster.tree import device_tables
from support.joining import requests_of, run_joining
from support.learning_budget import LearningBudget
from support.static_engines import engine_options, make_static


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
