"""Tensor parallelism on one GPU: two processes joined by Gloo, and NCCL with a group of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.recording import CudaGraphs
from jetflow_cluster.parallel.tp_group import TpGroup
from support.joining import requests_of
from support.mixed_batches import make_requests, run_mixed
from support.near_ties import assert_same_tokens
from support.oracle import Oracle
from support.rank_engines import run_on_ranks


class OneOfNccl(TpGroup):
    """A group of one whose collectives are called all the same. NCCL launches no kernel for them, so what is recorded
    is torch's side of it."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, 0)
        return x

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x)]
        dist.all_gather(parts, x.contiguous())
        return parts[0]


def _config(folders: tuple[Path, Path], dtype: str) -> EngineConfig:
    return EngineConfig(
        model=str(folders[0]), draft_head=str(folders[1]), dtype=dtype, draft_dtype=dtype, device="cuda", num_pages=128
    )


def test_two_ranks_in_fp32(folders: tuple[Path, Path], oracle: Oracle, tmp_path: Path) -> None:
    prompts, params = make_requests(9, max_tokens=20)
    found = run_on_ranks(_config(folders, "float32"), 2, prompts, params, tmp_path)
    expected = [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    print("near-ties:", assert_same_tokens(found.token_ids, expected, prompts, params, oracle) or "none")


def test_two_ranks_in_fp64_without_exception(folders: tuple[Path, Path], oracle: Oracle, tmp_path: Path) -> None:
    prompts, params = make_requests(5, max_tokens=16)
    found = run_on_ranks(_config(folders, "float64"), 2, prompts, params, tmp_path)
    assert found.token_ids == [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]


def test_two_ranks_on_static_buffers(folders: tuple[Path, Path], oracle: Oracle, tmp_path: Path) -> None:
    """Not recorded, as Gloo joins them."""
    prompts, params = zip(*requests_of(6, "changed"), strict=True)
    found = run_on_ranks(_config(folders, "float64"), 2, prompts, params, tmp_path, is_static=True)
    assert found.token_ids == [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert len(found.buckets) > 10


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_replay_the_same_steps(folders: tuple[Path, Path], oracle: Oracle, tmp_path: Path) -> None:
    prompts, params = zip(*requests_of(6, "changed"), strict=True)
    found = run_on_ranks(_config(folders, "float64"), 2, prompts, params, tmp_path, backend="nccl")
    assert found.token_ids == [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert len(found.buckets) > 10


def test_nccl_collectives_in_a_graph(tmp_path: Path) -> None:
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    try:
        given = torch.zeros(8, device="cuda")
        reduced, gathered = torch.empty_like(given), torch.empty_like(given)

        def launches() -> None:
            reduced.copy_(given)
            dist.all_reduce(reduced)
            reduced.mul_(2.0)
            dist.broadcast(reduced, 0)
            dist.all_gather_into_tensor(gathered, reduced)

        # The communicator is made by the first collective, which cannot be recorded.
        launches()
        torch.cuda.synchronize()
        replay = CudaGraphs(torch.device("cuda", torch.cuda.current_device())).record(launches)
        for value in (1.0, 3.0):
            given.fill_(value)
            replay()
            torch.cuda.synchronize()
            assert gathered.tolist() == [2.0 * value] * 8
    finally:
        dist.destroy_process_group()


def test_nccl_with_one_rank(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, params = make_requests(6, max_tokens=12)
    expected = run_mixed(*folders, prompts, params, dtype="float32", draft_dtype="float32", device="cuda")
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    try:
        numbers = torch.arange(4.0, device="cuda")
        dist.all_reduce(numbers)
        gathered = [torch.empty_like(numbers)]
        dist.all_gather(gathered, numbers)
        dist.broadcast(numbers, 0)
        assert numbers.tolist() == gathered[0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert TpGroup.from_process_group().smallest(7) == 7
        tp = OneOfNccl(0, 1)
        frontend = EngineFrontend(_config(folders, "float32"), tree_nodes={8: 12}, tp=tp)
        requests = [frontend.make_request(str(i), p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        for request in requests:
            frontend.engine.add(request)
        while frontend.engine.has_work:
            frontend.engine.step()
        runner = frontend.engine.compute.__self__
        assert isinstance(runner, GraphRunner)
        assert runner.num_static_steps > 0
        assert [r.output().token_ids for r in requests] == [output.token_ids for output in expected]
    finally:
        dist.destroy_process_group()
