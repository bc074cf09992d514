"""The engine on a device that keeps its tensors apart from the host's: what a GPU would refuse fails here too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.graph_runner import GraphRunner
from support.draft_workers import remote_heads, wait_for
from support.joining import requests_of, run_joining
from support.mixed_batches import make_requests
from support.oracle import Oracle
from support.pretend_gpu import CUDA, PretendGpu, pretended_gpu
from support.rank_engines import MAX_KEPT, run_on_ranks
from support.small_models import EOS_ID, write_head, write_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a head size that the kernels have."""
    target = write_target(tmp_path_factory.mktemp("target"), num_layers=2, max_len=256, head_dim=64)
    return target, write_head(tmp_path_factory.mktemp("head"), target)


def options_of(folders: tuple[Path, Path], dtype: str = "float64") -> dict[str, object]:
    return {
        "model": str(folders[0]),
        "draft_head": str(folders[1]),
        "dtype": dtype,
        "draft_dtype": dtype,
        "page_size": 16,
        "num_pages": 40,
        "max_model_len": 64,
        "max_num_requests": 8,
        "max_num_batched_tokens": 128,
        "max_prompt_chunk": 6,
        "tree_nodes": {1: 12},
    }


@pytest.mark.parametrize("has_graphs", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", ["mixed", "changed"])
def test_same_tokens_as_on_a_cpu(
    folders: tuple[Path, Path], kind: str, has_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = requests_of(3, kind)
    expected = run_joining(LLM(**options_of(folders), device="cpu"), given)
    with pretended_gpu(monkeypatch) as gpu:
        llm = LLM(**options_of(folders), device="cuda", cuda_graphs=has_graphs)
        found = run_joining(llm, given)
    assert [(o.token_ids, o.finish_reason) for o in found] == [(o.token_ids, o.finish_reason) for o in expected]
    runner = getattr(llm.engine.compute, "__self__", None)
    assert isinstance(runner, GraphRunner) is has_graphs
    if isinstance(runner, GraphRunner):
        assert runner.num_static_steps > 10 and runner.num_mixed_steps > 3
    for kernel in ("accept_tree.accept_tree_triton", "build_tree.build_tree_triton", "commit_kv.commit_kv_triton"):
        assert gpu.launches[kernel] > 0


@pytest.mark.parametrize(
    ("dtype", "has_graphs", "tree_nodes"),
    [
        ("float64", False, {1: 9}),
        ("float32", True, {1: 9}),
        ("bfloat16", False, {1: 9}),
        pytest.param("bfloat16", True, None, marks=pytest.mark.slow),
    ],
)
def test_every_part(
    folders: tuple[Path, Path],
    dtype: str,
    has_graphs: bool,
    tree_nodes: dict[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts repeat themselves, prompts begin alike, pages run out, one is aborted; in one case a warm-up decides.

    fp64 runs in plain torch between the kernels of trees, the others by kernels throughout.
    """
    options = options_of(folders, dtype) | {"tree_nodes": tree_nodes, "num_pages": 6, "cuda_graphs": has_graphs}
    repeating = [1, 2, 3, 4, 5, 6, 7] * 2
    force = SpeculationOptions(mode="force", max_tree_nodes=9)
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, speculation=force),
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.9, seed=1),
        SamplingParams(max_tokens=12, prompt_logprobs=2, logprobs=2),
        SamplingParams(max_tokens=40, ignore_eos=True, logit_bias={3: 2.0}, repetition_penalty=1.1),
        SamplingParams(max_tokens=20, ignore_eos=True, speculation=SpeculationOptions(mode="off")),
    ]
    prompts = [repeating, repeating[:9] + [9], [8], repeating, [5, 4]]
    with pretended_gpu(monkeypatch) as gpu:
        llm = LLM(**options, device="cuda")
        engine = llm.engine
        assert engine.target.kv.device == CUDA and engine.target.kv.dtype is getattr(torch, dtype)
        requests = [llm.frontend.make_request(str(i), *one) for i, one in enumerate(zip(prompts, params, strict=True))]
        for request in requests:
            engine.add(request)
        for _ in range(6):
            engine.step()
        engine.abort("1")
        while engine.has_work:
            engine.step()
        outputs = [request.output() for request in requests]
        stats = llm.stats()
    assert all(request.error is None for request in requests)
    assert [o.usage.completion_tokens for o in outputs if o.request_id != "1"] == [40, 12, 40, 20]
    assert outputs[2].prompt_logprobs is not None and outputs[2].logprobs is not None
    assert stats.num_preemptions > 0
    assert stats.num_used_pages == 0
    if dtype != "float64":
        assert gpu.launches["tree_attention.attend"] > 20
        assert gpu.launches["qk_norm_rope_store.qk_norm_rope_store_triton"] > 20


def test_a_replayed_step_waits_for_nothing(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the event behind its outcome, once its bucket is there."""
    params = [SamplingParams(max_tokens=30, ignore_eos=True, temperature=t, seed=7) for t in (0.0, 0.8)]
    with pretended_gpu(monkeypatch) as gpu:
        llm = LLM(**options_of(folders), device="cuda")
        runner = llm.engine.compute.__self__
        assert isinstance(runner, GraphRunner)
        for _ in range(2):
            waits, num_buckets = _steps(llm, gpu, params), len(runner.steps.kept)
        assert len(runner.steps.kept) == num_buckets and runner.num_static_steps > 10
    assert waits == []


def _steps(llm: LLM, gpu: PretendGpu, params: list[SamplingParams]) -> list[str]:
    """Waits of the steps behind the prompts, of which one is chunked."""
    for i, one in enumerate(params):
        llm.engine.add(llm.frontend.make_request(str(i), [1, 2, 3, 4, 5, 6, 7, 8 + i], one))
    for _ in range(4):
        llm.engine.step()
    gpu.waits.clear()
    while llm.engine.has_work:
        llm.engine.step()
    return list(gpu.waits)


def test_two_ranks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, params = make_requests(4, max_tokens=10)
    options = {"model": str(folders[0]), "draft_head": str(folders[1]), "dtype": "float64", "draft_dtype": "float64"}
    config = EngineConfig(**options, device="cuda", num_pages=128)
    found = run_on_ranks(config, 2, prompts, params, tmp_path)
    oracle = Oracle(folders[0], torch.float64, frozenset({EOS_ID}), 256)
    assert found.token_ids == [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert found.buckets == []


def test_two_ranks_on_static_buffers(tmp_path: Path) -> None:
    """The embedded model, whose head is right often: ranks that did not follow the first one's guesses and choice would
    compute something else. Prompts join, texts repeat themselves, and some steps are passes one by one."""
    options = {"dtype": "float64", "draft_dtype": "float64", "num_pages": 60, "max_model_len": 96}
    options |= {"max_num_requests": 4, "max_prompt_chunk": 9}
    llm = LLM(**options, tree_nodes={1: 12}, device="cpu")
    texts = ["def quicksort(items):", "x = [1, 2]\nprint(x)\n" * 3 + "x = [1,", "class Stack:\n    def", "import os\n"]
    prompts = [llm.tokenizer.encode(text).ids for text in texts]
    force = SpeculationOptions(mode="force", max_tree_nodes=12)
    params = [
        SamplingParams(max_tokens=12, temperature=0.0, speculation=force),
        SamplingParams(max_tokens=12, temperature=0.0),
        SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, seed=3, repetition_penalty=1.1, speculation=force),
        SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=1, speculation=SpeculationOptions(mode="off")),
    ]
    expected = llm.generate(prompts, params)
    assert sum(output.speculation.mean_acceptance_length for output in expected) > 7
    found = run_on_ranks(EngineConfig(**options, device="cuda"), 2, prompts, params, tmp_path, is_static=True)
    assert found.token_ids == [output.token_ids for output in expected]
    kinds = {(b.has_head, b.has_lookup, b.has_changes) for b in found.buckets}
    assert {(True, False, False), (True, True, True)} <= kinds, kinds
    assert any(not bucket.has_trees for bucket in found.buckets)
    assert len(set(found.buckets)) > MAX_KEPT, "some gave way"
    assert 10 < len(found.buckets) < found.num_steps, "some steps were passes one by one"


def test_draft_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, so that one asks the other for draft context."""
    params = [SamplingParams(max_tokens=12, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]
    prompts = [[1, 2, 3, 4], [7] * 20]
    with remote_heads(tmp_path) as setup:
        expected = [output.token_ids for output in setup.llm(device="cpu").generate(prompts, params)]
        setup.config = replace(setup.config, device="cuda")
        with pretended_gpu(monkeypatch):
            llm = setup.llm(device="cuda")
            for i in range(2):
                setup.start_worker(f"worker-{i}")
                wait_for(setup, i + 1)
            assert [output.token_ids for output in llm.generate(prompts, params)] == expected
            assert llm.stats().num_drafted_steps > 5


def test_what_a_gpu_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        own, hosts = torch.zeros(4, device="cuda"), torch.ones(4)
        assert own.device == CUDA and (own + 1).is_cuda and own[1:].view(3, 1).T.device == CUDA
        for refused in (
            lambda: own + hosts,
            lambda: torch.cat((own, hosts)),
            lambda: hosts[own.long()],
            lambda: own.numpy(),
            lambda: own.index_copy_(0, torch.tensor([1]), own[:1]),
        ):
            with pytest.raises(AssertionError):
                refused()
        assert gpu.waits == []
        own[torch.tensor([1, 2])] = 2.0
        own.copy_(hosts, non_blocking=True)
        moved = own.to("cpu")
        moved += 1
        assert gpu.waits == ["to"] and own.tolist() == [1.0] * 4 and not isinstance(moved, type(own))
