"""A plan's numbers against what engines really allocate, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine import loading, planned_memory
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.loading import load_draft_worker
from jetflow_cluster.engine.memory_plan import MemoryItem, MemoryPlan, fit_pages
from jetflow_cluster.engine.planned_memory import plan_draft_worker, plan_memory
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.types import SpeculationMode
from support.allocations import allocations_of

CPU = torch.device("cpu")


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sizes(plan: MemoryPlan) -> dict[str, int]:
    return {line.name: line.num_bytes for line in plan.lines()}


def options(target: Path, head: Path | None, **more: object) -> dict[str, object]:
    given = {"model": str(target), "draft_head": str(head) if head else None, "num_pages": 11, "page_size": 5}
    return given | {"max_num_requests": 4, "max_num_batched_tokens": 64} | more


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_and_pages_are_planned_to_the_byte(tiny_target_dir: Path, tiny_head_dir: Path, dtype: str) -> None:
    given = options(tiny_target_dir, tiny_head_dir, dtype=dtype)
    plan = plan_memory(EngineConfig(**given))
    llm = LLM(tree_nodes={1: 1}, **given)
    target, drafter = llm.engine.target, llm.engine.drafter
    assert isinstance(drafter, HeadDrafter)
    model = target.model
    ends = (*model.embedding.parameters(), *model.lm_head.parameters())
    found = sizes(plan)
    assert found["KV pages"] == bytes_of(target.kv)
    assert found["draft KV pages"] == bytes_of(drafter.kv)
    assert found["embedding"] == bytes_of(model.embedding.weight)
    assert found["lm_head"] == bytes_of(model.lm_head.weight)
    assert found["target"] == bytes_of(*model.parameters()) - bytes_of(*ends)
    assert found["draft head"] == bytes_of(*drafter.head.parameters())
    assert drafter.sidecar is not None
    assert found["side-car"] == bytes_of(drafter.sidecar.parent, drafter.sidecar.child)
    assert plan.total_bytes == sum(found.values())
    assert sizes(llm.frontend.memory) == found


def test_a_tied_output_layer_is_counted_once() -> None:
    found = sizes(plan_memory(EngineConfig(num_pages=1)))
    assert "lm_head" not in found
    assert found["embedding"] > 0


def test_layouts_are_counted_where_they_are_made(tiny_target_dir: Path, tiny_head_dir: Path) -> None:
    names = ("target, laid out for the CPU", "draft head, laid out for the CPU")
    wide = options(tiny_target_dir, tiny_head_dir, dtype="float64", draft_dtype="float64")
    assert not set(names) & sizes(plan_memory(EngineConfig(**wide))).keys()
    given = options(tiny_target_dir, tiny_head_dir, dtype="float32", draft_dtype="float32")
    found = sizes(plan_memory(EngineConfig(**given)))
    drafter = LLM(tree_nodes={1: 1}, **given).engine.drafter
    assert isinstance(drafter, HeadDrafter)
    position = torch.zeros(2, dtype=torch.int64)
    drafter.head.project_context(torch.zeros(2, 32), position, position, drafter.kv)
    assert drafter.head._packed_context is not None
    linears = [m for m in drafter.head.modules() if getattr(m, "_packed", None) is not None]
    kv_parts = [layer.attention.qkv.kv_weight for layer in drafter.head.layers]
    assert found[names[1]] == bytes_of(*(m.weight for m in linears), *kv_parts)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_plans_its_own_part(tiny_target_dir: Path, tiny_head_dir: Path, rank: int) -> None:
    given = EngineConfig(**options(tiny_target_dir, tiny_head_dir), tensor_parallel_size=2)
    whole = sizes(plan_memory(replace(given, tensor_parallel_size=1)))

    class Half(TpGroup):
        def smallest(self, value: int) -> int:
            return value

    part = sizes(plan_memory(given, Half(rank, 2)))
    for name in ("embedding", "lm_head", "KV pages", "draft KV pages"):
        assert part[name] * 2 == whole[name]
    assert whole["target"] / 2 <= part["target"] < whole["target"]
    assert part["side-car"] == whole["side-car"]


def test_a_draft_worker_has_the_ends_for_itself(tiny_target_dir: Path, tiny_head_dir: Path) -> None:
    config = EngineConfig(**options(tiny_target_dir, tiny_head_dir, dtype="float64", draft_dtype="float64"))
    found = sizes(plan_draft_worker(config, num_pages=7))
    drafter = load_draft_worker(config, num_pages=7)
    ends = drafter._target
    assert drafter.sidecar is not None
    assert found.pop("activations") > 0
    assert found == {
        "embedding": bytes_of(ends.embedding.weight),
        "lm_head": bytes_of(ends.lm_head.weight),
        "draft head": bytes_of(*drafter.head.parameters()),
        "side-car": bytes_of(drafter.sidecar.parent, drafter.sidecar.child),
        "draft KV pages": bytes_of(drafter.kv),
    }


@pytest.mark.parametrize("nodes", [1, 16], ids=["single tokens", "trees"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_stay_within_the_activations(tiny_target_dir: Path, tiny_head_dir: Path, dtype: str, nodes: int) -> None:
    """The largest batch: prompts that fill a step with log-probabilities of every row, then full trees."""
    given = options(tiny_target_dir, tiny_head_dir, dtype=dtype, num_pages=200, max_model_len=120)
    llm = LLM(tree_nodes={1: nodes}, **given)
    speculation = SpeculationOptions(mode=SpeculationMode.FORCE if nodes > 1 else SpeculationMode.OFF)
    speculation = replace(speculation, max_tree_nodes=nodes if nodes > 1 else None)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, speculation=speculation, prompt_logprobs=3)
    requests = [llm.frontend.make_request(f"r{i}", [1 + i] * 60, params) for i in range(4)]
    for request in requests:
        llm.engine.add(request)
    planned = sizes(llm.frontend.memory)["activations"]
    peaks = []
    while llm.engine.has_work:
        # What a step leaves is told apart from what it works with: fused vectors and caches stay.
        found = allocations_of(llm.engine.step)
        peaks.append(found.peak)
    assert planned / 4 < max(peaks) <= planned


def test_recorded_steps_have_a_scratch_page_and_a_pool(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_memory, "available_memory_bytes", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = options(tiny_target_dir, tiny_head_dir, device="cuda")
    plan = plan_memory(EngineConfig(**given))
    without = plan_memory(EngineConfig(**given, cuda_graphs=False))
    elsewhere = plan_memory(EngineConfig(**given), with_head=False)
    assert (plan.num_scratch_pages, without.num_scratch_pages, elsewhere.num_scratch_pages) == (1, 0, 0)
    assert "graphs" not in sizes(elsewhere)
    assert sizes(plan)["graphs"] > sizes(plan)["activations"]
    assert plan.total_bytes - without.total_bytes == sizes(plan)["graphs"] + plan.page_bytes
    assert not [name for name in sizes(plan) if "CPU" in name]


def plan_of(available: int, fixed: int, *, device: str = "cpu") -> MemoryPlan:
    item = MemoryItem(name="weights", num_bytes=fixed)
    return MemoryPlan(
        device=torch.device(device),
        available_bytes=available,
        items=(item,),
        target_page_bytes=90,
        draft_page_bytes=10,
    )


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        pytest.param(plan_of(10_000, 1_000), 30, id="CPU: a share is left for others"),
        pytest.param(plan_of(10_000, 9_000), 10, id="CPU: what the rest leaves"),
        pytest.param(plan_of(10_000, 1_000, device="cuda"), 84, id="CUDA: nearly all"),
        pytest.param(plan_of(10**9, 1_000), 32, id="no more than the largest batch"),
        pytest.param(replace(plan_of(10_000, 1_000, device="cuda"), num_scratch_pages=2), 82, id="scratch pages"),
    ],
)
def test_pages_by_memory(plan: MemoryPlan, expected: int) -> None:
    fitted = fit_pages(plan, num_pages=None, pages_per_request=8, max_num_requests=4 if expected == 32 else 1000)
    assert fitted.num_pages == expected
    assert fitted.total_bytes <= fitted.usable_bytes


@pytest.mark.parametrize(
    ("num_pages", "names"),
    [(None, ["needs 8 pages of 100 bytes", "allows 7", "lower max_model_len"]), (9, ["num_pages = 9", "with 8 pages"])],
    ids=["unsized", "sized"],
)
def test_what_does_not_fit_is_refused_with_the_table(num_pages: int | None, names: list[str]) -> None:
    fixed = 9_150 if num_pages else 9_250
    with pytest.raises(ValueError, match="num_pages") as caught:
        fit_pages(plan_of(10_000, fixed), num_pages=num_pages, pages_per_request=8, max_num_requests=4)
    sentence, (table,) = str(caught.value), caught.value.__notes__
    assert "\n" not in sentence
    for expected in names:
        assert expected in sentence
    for expected in ["KV pages", "draft KV pages", "weights", str(fixed), "10000", "free on cpu"]:
        assert expected in table


def test_an_engine_that_does_not_fit_loads_nothing(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_memory, "available_memory_bytes", lambda device: 200_000)
    monkeypatch.setattr(loading, "load_target", lambda *args, **options: pytest.fail("the target is loaded"))
    with pytest.raises(ValueError, match="num_pages = 11: "):
        LLM(tree_nodes={1: 1}, **options(tiny_target_dir, tiny_head_dir))
