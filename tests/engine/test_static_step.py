"""Steps on static buffers against the engine's own: the same tokens, in every bucket, and no host in between."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine import static_step
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.request import Request
from jetflow_cluster.tree import device_tables
from jetflow_cluster.types import SpeculationMode
from support.static_engines import make_static

PAGE_SIZE = 5


def engine_options(target: Path, head: Path) -> dict[str, object]:
    return {
        "model": str(target),
        "draft_head": str(head),
        "dtype": "float64",
        "draft_dtype": "float64",
        "page_size": PAGE_SIZE,
        "num_pages": 300,
        "max_num_requests": 8,
        "max_num_batched_tokens": 128,
        "context_lookup": False,
        "tree_nodes": {1: 12},
    }


@pytest.fixture(scope="module")
def eager(tiny_target_dir: Path, tiny_head_dir: Path) -> LLM:
    return LLM(**engine_options(tiny_target_dir, tiny_head_dir))


@pytest.fixture
def static(tiny_target_dir: Path, tiny_head_dir: Path) -> tuple[LLM, GraphRunner]:
    llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir))
    return llm, make_static(llm)


def options_of(rng: random.Random, *, sampled: bool, filters: bool) -> SamplingParams:
    mode = rng.choice([SpeculationMode.AUTO, SpeculationMode.FORCE, SpeculationMode.OFF, SpeculationMode.FORCE])
    nodes = rng.choice([2, 5, 9, 20]) if mode is SpeculationMode.FORCE else None
    return SamplingParams(
        max_tokens=rng.randint(1, 24),
        temperature=rng.choice([0.6, 1.0, 1.4]) if sampled else 0.0,
        seed=rng.randrange(2**64),
        top_k=rng.choice([0, 5, 40]) if filters else 0,
        top_p=rng.choice([1.0, 0.8]) if filters else 1.0,
        min_p=rng.choice([0.0, 0.1]) if filters else 0.0,
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=nodes),
    )


def requests_of(seed: int, kind: str, num: int = 7) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    found = []
    for i in range(num):
        sampled = kind in ("sampled", "filtered") or (kind == "mixed" and i % 2 == 1)
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 14))]
        found.append((prompt, options_of(rng, sampled=sampled, filters=kind == "filtered")))
    return found


def run_joining(llm: LLM, given: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """Requests join one by one, every third step, and leave as they end."""
    made: list[Request] = []
    steps = 0
    while len(made) < len(given) or llm.engine.has_work:
        if len(made) < len(given) and steps % 3 == 0:
            prompt, params = given[len(made)]
            made.append(llm.frontend.make_request(f"r{len(made)}", prompt, params))
            llm.engine.add(made[-1])
        llm.engine.step()
        steps += 1
    for request in made:
        assert request.error is None, request.error
    return [request.token_ids[len(request.prompt_token_ids) :] for request in made]


@pytest.mark.parametrize("kind", ["greedy", "sampled", "mixed", "filtered"])
def test_same_tokens_as_eager_steps(eager: LLM, static: tuple[LLM, GraphRunner], kind: str) -> None:
    llm, runner = static
    given = requests_of(3, kind)
    expected = run_joining(eager, given)
    assert run_joining(llm, given) == expected
    assert runner.num_static_steps > 10
    buckets = list(runner._steps)
    assert len({bucket.num_requests for bucket in buckets}) > 1
    assert len({bucket.num_nodes for bucket in buckets}) > 1
    assert llm.stats().num_used_pages == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_same_tokens_where_guesses_are_right(temperature: float) -> None:
    """The embedded model, whose head is right often: paths of several nodes move K, V and draft context."""
    options = {"dtype": "float64", "draft_dtype": "float64", "num_pages": 60, "max_model_len": 96}
    options |= {"max_num_requests": 4, "context_lookup": False, "tree_nodes": {1: 1}}
    # From 17 nodes on eager tables are as wide as static ones.
    force = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=20)
    prompts = ["def quicksort(items):", "class Stack:\n    def __init__(self):"]
    params = [SamplingParams(max_tokens=20, temperature=temperature, seed=i, speculation=force) for i in range(2)]
    eager = LLM(**options)
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


@pytest.mark.parametrize("kind", ["greedy", "mixed", "filtered"])
def test_a_step_touches_no_host(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    llm = LLM(**engine_options(tiny_target_dir, tiny_head_dir))
    guard = NoHost()
    recorder = Guarded(guard)
    runner = make_static(llm, recorder)
    refuse_host(monkeypatch, guard)
    run_joining(llm, requests_of(5, kind, num=4))
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
