"""Nothing is compiled behind readiness. Without a GPU, launches compile for one that is not there and do not run."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from jetflow_kernels import aot, compilations  # noqa: E402
from jetflow_kernels.accept_tree import (  # noqa: E402
    SamplingTable,
    VerifiedTrees,
    WalkBuffers,
    accept_tree,
    commit_slots,
)
from jetflow_kernels.build_tree import build_tree, lay_out_rows  # noqa: E402
from jetflow_kernels.commit_kv import commit_kv  # noqa: E402
from jetflow_kernels.philox_gumbel import philox_gumbel  # noqa: E402
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store  # noqa: E402
from jetflow_kernels.shipped import DTYPES, HEAD_DIMS  # noqa: E402
from jetflow_kernels.tree_attention import tree_attention  # noqa: E402
from jetflow_kernels.warmup import launch_every_kernel, launch_tree_kernels  # noqa: E402
from support.attention_batches import Requests, make_case  # noqa: E402
from support.tree_tables import make_layout, make_tables  # noqa: E402

OPS = ("commit_kv", "qk_norm_rope_store", "tree_attention")
TREE_OPS = ("build_tree", "accept_tree", "philox_gumbel")


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
    for op in OPS + TREE_OPS:
        monkeypatch.setattr(f"jetflow_kernels.{op}.dispatch.runs_triton", lambda device: True)
    monkeypatch.setattr("jetflow_kernels.warmup.runs_triton", lambda device: True)
    monkeypatch.setattr(driver, "_active", _AbsentGpu())
    yield "cpu"


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What kernels are launched with; nothing is compiled, and nothing runs."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del grid, warmup
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        constants = {kernel.arg_names[i]: given[kernel.arg_names[i]] for i in kernel.constexprs}
        pointers = {n: TYPES[x.dtype] for n, x in given.items() if isinstance(x, torch.Tensor)}
        # What the compiler would tell apart besides.
        free = {p.name for p in kernel.params if p.do_not_specialize}
        ints = {n: x for n, x in given.items() if n in kernel.arg_names and isinstance(x, int) and n not in free}
        kinds = {n: (x == 1, x % 16 == 0) for n, x in ints.items() if n not in constants}
        found.append(
            Launch(kernel.fn.__name__, _frozen(constants), _frozen(pointers), options["num_warps"], _frozen(kinds))
        )

    monkeypatch.setattr(JITFunction, "run", note)
    return found


TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it was asked for."""

    name: str
    constants: frozenset[tuple[str, object]]
    pointers: frozenset[tuple[str, object]]
    num_warps: int
    #: Of numbers that code is specialised for: whether they are 1, and whether they are multiples of 16.
    kinds: frozenset[tuple[str, object]] = frozenset()


def _frozen(values: dict[str, Any]) -> frozenset[tuple[str, object]]:
    return frozenset(values.items())


def _shipped() -> set[Launch]:
    return {
        Launch(
            found.kernel.fn.__name__,
            _frozen(dict(found.constants)),
            _frozen({name: kind for name, kind in found.types.items() if kind.startswith("*")}),
            found.num_warps,
        )
        for found in aot.shipped_configurations()
    }


def test_what_is_launched_at_warm_up_is_what_is_shipped(launches: list[Launch], device: str) -> None:
    """Of all models together; what is in the one is in the other."""
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        kv = torch.zeros(1, 2, 2, 16, 1, head_dim, dtype=dtype, device=device)
        launch_every_kernel(kv, num_heads=2, dtype=dtype)
    for dtype in (*DTYPES, torch.float64):
        launch_tree_kernels(torch.device(device), vocab_size=5000, dtype=dtype)
    assert {replace(launch, kinds=frozenset()) for launch in launches} == _shipped()


def _random_step(rng: random.Random, vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Trees of random sizes, their rows, their walk and its slots, with and without a price, filters and penalties."""
    num_requests, num_nodes = rng.choice([1, 2, 5, 40, 80]), rng.choice([1, 2, 9, 33, 64, 200, 512])
    num_depths, width = rng.choice([1, 7, 15, 24, 40]), rng.choice([1, 2, 16])
    shape = {"num_requests": num_requests, "num_depths": num_depths, "width": width, "num_nodes": num_nodes}
    budget = num_requests + rng.choice([0, 7, 100, 900])
    is_conditional = width > 1 and rng.random() < 0.5
    case = make_tables(
        rng, **shape, is_conditional=is_conditional, spread=3, budget=budget, is_priced=rng.random() < 0.5
    ).to(device)
    trees = case.buffers(device)
    build_tree(case.candidates, case.limits, trees)
    layout = make_layout(trees, rng.choice([1, 4, 16]))
    contexts = torch.zeros(num_requests, dtype=torch.int32, device=device)
    pages = {"context_lens": contexts, "page_table": torch.zeros(num_requests, 3, dtype=torch.int32, device=device)}
    lay_out_rows(trees, layout, **pages, page_size=16, pad_slot=0, tile_rows=4)
    num_levels = num_depths + 1
    table = None
    if rng.random() < 0.7:
        has_changes, has_filters = rng.random() < 0.5, rng.random() < 0.5
        table = SamplingTable.allocate(
            num_requests=num_requests,
            num_changed=rng.choice([0, 1, 30]),
            num_barred=rng.choice([0, 1, 3]),
            has_changes=has_changes,
            has_filters=has_filters,
            device=torch.device(device),
        )
    logits = torch.zeros(max(trees.num_rows, num_requests), vocab_size, dtype=dtype, device=device)
    walk = WalkBuffers.allocate(
        num_requests=num_requests,
        num_levels=num_levels,
        num_rows=logits.shape[0],
        vocab_size=vocab_size,
        is_processed=table is not None and table.is_processed,
        device=torch.device(device),
    )
    verified = VerifiedTrees(
        token_ids=trees.token_ids, parents=trees.parents, counts=trees.counts, first_rows=trees.row_start, logits=logits
    )
    accept_tree(verified, table, walk)
    source, target = (torch.zeros(num_requests, num_levels, dtype=torch.int64, device=device) for _ in range(2))
    commit_slots(walk, source, target, **pages, page_size=16)
    numbers = torch.arange(rng.randrange(1, 20), device=device)[rng.randrange(2) :]
    philox_gumbel(numbers, numbers, numbers)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, torch.float32), (4096, torch.bfloat16)], ids=str)
def test_steps_launch_nothing_that_warm_up_did_not(
    launches: list[Launch], device: str, vocab_size: int, dtype: torch.dtype
) -> None:
    launch_tree_kernels(torch.device(device), vocab_size=vocab_size, dtype=dtype)
    warm = set(launches)
    launches.clear()
    rng = random.Random(vocab_size)
    for _ in range(40):
        _random_step(rng, vocab_size, dtype, device)
    assert not set(launches) - warm
    assert len(set(launches)) > 20


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
