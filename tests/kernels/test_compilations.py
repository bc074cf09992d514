"""Nothing is compiled behind readiness. Without a GPU, launches compile for one that is not there and do not run."""

from __future__ import annotations

import importlib
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from jetflow_kernels import compilations  # noqa: E402
from jetflow_kernels.commit_kv import commit_kv  # noqa: E402
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store  # noqa: E402
from jetflow_kernels.tree_attention import tree_attention  # noqa: E402
from jetflow_kernels.warmup import launch_every_kernel  # noqa: E402
from support.attention_batches import Requests, make_case  # noqa: E402

OPS = ("commit_kv", "qk_norm_rope_store", "tree_attention")


class _AbsentGpu:
    """What triton asks of a driver until it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if torch.cuda.is_available():
        yield "cuda"
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: run(*args, **(kwargs | {"warmup": True})))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    for op in OPS:
        monkeypatch.setattr(f"jetflow_kernels.{op}.dispatch.runs_triton", lambda device: True)
    monkeypatch.setattr("jetflow_kernels.warmup.runs_triton", lambda device: True)
    monkeypatch.setattr(driver, "_active", _AbsentGpu())
    yield "cpu"


def _random_batch(rng: random.Random) -> Requests:
    kinds = [("chain", rng.choice([1, 1, 7, 40])) if rng.random() < 0.5 else ("tree", rng.randrange(2, 40))]
    kinds += [("chain", 1)] * rng.randrange(3) + [("tree", rng.randrange(2, 16))] * rng.randrange(3)
    return [(rows, rng.choice([0, 1, 15, 16, 100, 700]), kind) for kind, rows in kinds]


def _step(requests: Requests, heads: tuple[int, int], kv: torch.Tensor, device: str, rng: random.Random) -> None:
    """What an attention layer and a commit do with a batch, on buffers whose addresses are multiples of 4 or 8 only."""
    case = make_case(requests, heads=heads, head_dim=kv.shape[5], dtype=kv.dtype).to(device)
    num_rows, num_all = case.plan.num_rows, heads[0] + 2 * heads[1]
    qkv = torch.zeros(num_rows, num_all, kv.shape[5], dtype=kv.dtype, device=device)
    angles = torch.zeros(num_rows, 1, kv.shape[5], dtype=kv.dtype, device=device)
    slots = torch.arange(num_rows + 1, device=device)[1:]
    weight = qkv[0, : heads[0] + heads[1]].clone() if rng.random() < 0.5 else None
    q = qk_norm_rope_store(qkv, weight, angles, angles, slots, kv[1, 0], kv[1, 1], num_heads=heads[0], eps=1e-6)
    tree_attention(case.plan, q, case.k_pages, case.v_pages, scale=rng.choice([0.125, 1.0]))
    moves = torch.arange(rng.randrange(1, 40), device=device)[rng.randrange(2) :] + 1
    commit_kv(kv, moves, moves - 1)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.float32, 80)], ids=str)
def test_a_warm_engine_compiles_nothing(
    dtype: torch.dtype, head_dim: int, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    heads = (4, 2)
    kv = torch.zeros(2, 2, 64, 16, heads[1], head_dim, dtype=dtype, device=device)
    compilations.watch()
    compilations.mark_loading()
    launch_every_kernel(kv, num_heads=heads[0], dtype=dtype)
    compilations.mark_ready()
    rng = random.Random(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            _step(_random_batch(rng), heads, kv, device, rng)
    late = compilations.since_readiness()
    compilations.mark_loading()
    assert late == 0
    assert not caplog.records


def test_the_counter_sees_compilations(device: str, caplog: pytest.LogCaptureFixture) -> None:
    compilations.watch()
    before = compilations.total()
    for op in OPS:
        for found in vars(importlib.import_module(f"jetflow_kernels.{op}.kernel")).values():
            if isinstance(found, triton.runtime.JITFunction):
                found.device_caches.clear()
    kv = torch.zeros(1, 2, 8, 16, 1, 64, dtype=torch.float16, device=device)
    compilations.mark_loading()
    launch_every_kernel(kv, num_heads=1, dtype=torch.float16)
    # One commit, one store, two tiles and the combination of splits.
    assert compilations.total() - before == 5
    compilations.mark_ready()
    with caplog.at_level(logging.WARNING):
        launch_every_kernel(kv.bfloat16(), num_heads=1, dtype=torch.bfloat16)
    late = compilations.since_readiness()
    compilations.mark_loading()
    # The commit moves bits, whatever their dtype.
    assert late == 4
    assert ["qk_norm_rope_store_kernel" in record.message for record in caplog.records] == [True, False, False, False]
