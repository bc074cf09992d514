"""Calls of every compiled CPU kernel, for other processors to make: odd sizes, both dtypes, NaN and infinity, each row
in several batches; with what plain torch gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jetflow_cluster.engine.value_model import KNOT_SHIFT, NUM_DEPTHS, NUM_KNOTS
from jetflow_cluster.tree import coupled
from jetflow_cluster.tree.build import MIN_SCORE, CandidateTable, build_trees
from jetflow_cluster.tree.coupled import candidate_tables
from jetflow_kernels.cpu import CpuKernels, attention, library, rows, trees
from jetflow_kernels.cpu.candidates import draft_candidates
from jetflow_kernels.pointwise import rms_norm, silu_mul
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from jetflow_kernels.tree_attention import plan_tree_attention
from support.attention_batches import BATCHES, AttentionCase, Requests, make_case
from support.recorded_calls import Call, Part, recording
from support.rope_rows import EPS, make_rows

_NOT_NUMBERS = (float("nan"), float("inf"), -float("inf"))
_DTYPES = (torch.float32, torch.bfloat16)
_NUM_ROWS = 5


def make_calls() -> list[Call]:
    """All of them, with the answers of this process's library."""
    with recording() as calls:
        for make in (_norms, _products, _heads, _attentions, _candidates, _trees, _maps):
            make(calls)
    return calls


def _by_torch(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_found", CpuKernels(functions=None, detail="off"))
        return compute()


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute: some units in the last place."""
    return (2e-6, 1e-6) if dtype is torch.float32 else (2**-7, 1e-6)


def _randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]).to(dtype)


def _add_rows(
    calls: list[Call], compute: Callable[[torch.Tensor], torch.Tensor | None], x: torch.Tensor, wanted: torch.Tensor
) -> None:
    """The whole of `x`, then each row and the first three by themselves."""
    assert compute(x) is not None
    index, row_bytes = len(calls) - 1, wanted[0].numel() * wanted.element_size()
    calls[index].wanted[0] = (wanted, *_tolerances(x.dtype))
    for first, last in [(0, 3), *((i, i + 1) for i in range(len(x)))]:
        assert compute(x[first:last]) is not None
        of = slice(first * row_bytes, last * row_bytes)
        calls[-1].parts.append(Part(whole=index, output=0, own=slice(None), of=of))


def _norms(calls: list[Call]) -> None:
    for dtype in _DTYPES:
        for size in (1, 10, 33, 384, 1000):
            x = _randn(size, _NUM_ROWS, 2 * size + 3, dtype=dtype)[:, 3 : 3 + size]
            weight = _randn(size + 1, size, 1, dtype=dtype)[:, 0].contiguous()
            if size == 33:
                x[1, 32], x[2, 7], x[3, 0] = _NOT_NUMBERS
            wanted = _by_torch(lambda x=x, weight=weight: rms_norm(x, weight, EPS))
            _add_rows(calls, lambda part, weight=weight: rows.rms_norm(part, weight, EPS), x, wanted)


def _products(calls: list[Call]) -> None:
    special = torch.tensor([*_NOT_NUMBERS, 0.0, -0.0, 3e38, -3e38, 1e-40, -1e-40])
    for dtype in _DTYPES:
        for size in (1, 37, 391, 1280):
            x = 8 * _randn(size, _NUM_ROWS, 2 * size + 5, dtype=dtype)[:, 5:]
            _add_rows(calls, rows.silu_mul, x, _by_torch(lambda x=x: silu_mul(x)))
        gate = torch.cat([torch.linspace(-120, 120, 20_001), special]).to(dtype).repeat(2, 1)
        _add_rows(calls, rows.silu_mul, torch.cat([gate, torch.ones_like(gate)], 1), torch.nn.functional.silu(gate))


def _heads(calls: list[Call]) -> None:
    kinds = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    shapes = [((4, 2), 64), ((3, 1), 10), ((0, 2), 128), ((5, 5), 38)]
    for dtype, pages in kinds:
        for (heads, head_dim), has_norm in ((shape, norm) for shape in shapes for norm in (True, False)):
            made = make_rows(_NUM_ROWS, heads=heads, head_dim=head_dim, dtype=dtype, has_norm=has_norm)
            made = replace(made, k_pages=made.k_pages.to(pages), v_pages=made.v_pages.to(pages))
            if head_dim == 10:
                made.qkv[1, 0, 3], made.qkv[2, 1, 9], made.qkv[4, 2, 0] = _NOT_NUMBERS
            plain, ours = made.to("cpu"), made.to("cpu")
            q = _by_torch(
                lambda plain=plain, heads=heads: qk_norm_rope_store(*plain.arguments(), num_heads=heads[0], eps=EPS)
            )
            assert rows.qk_norm_rope_store(*ours.arguments(), num_heads=heads[0], eps=EPS) is not None
            index = len(calls) - 1
            for i, wanted in enumerate((q, plain.k_pages, plain.v_pages)):
                calls[index].wanted[i] = (wanted, *_tolerances(wanted.dtype))
            q_bytes, slot_bytes = (n * head_dim * p.itemsize for n, p in ((heads[0], dtype), (heads[1], pages)))
            for i, slot in enumerate(made.slots.tolist()):
                alone = replace(
                    made.to("cpu"),
                    **{name: getattr(made, name)[i : i + 1] for name in ("qkv", "cos", "sin", "slots")},
                )
                assert rows.qk_norm_rope_store(*alone.arguments(), num_heads=heads[0], eps=EPS) is not None
                stored = slice(slot * slot_bytes, (slot + 1) * slot_bytes)
                calls[-1].parts += [
                    Part(whole=index, output=0, own=slice(None), of=slice(i * q_bytes, (i + 1) * q_bytes)),
                    Part(whole=index, output=1, own=stored, of=stored),
                    Part(whole=index, output=2, own=stored, of=stored),
                ]


def _attend(case: AttentionCase) -> None:
    scale = case.q.shape[2] ** -0.5
    assert attention.tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=scale) is not None


def _attentions(calls: list[Call]) -> None:
    shapes: list[dict] = [
        {},
        {"bidirectional": True},
        {"heads": (8, 2), "head_dim": 64},
        {"heads": (6, 1), "head_dim": 80},
        {"heads": (4, 4), "head_dim": 128, "page_size": 1},
        {"heads": (1, 1), "head_dim": 256, "page_size": 7},
    ]
    for dtype in _DTYPES:
        for shape in shapes:
            _add_attention(calls, BATCHES["everything"], dtype, shape)
        _add_attention(calls, [(1, 300, "chain"), (35, 100, "tree")], dtype, {"heads": (2, 2), "head_dim": 64})


def _add_attention(calls: list[Call], requests: Requests, dtype: torch.dtype, shape: dict) -> None:
    """The batch; of each request all of it, the first row and the first three alone; and rows of chains as requests of
    one token each, after a longer context."""
    case = make_case(requests, dtype=dtype, pages_dtype=torch.float32, **shape)
    _attend(case)
    plan, index = case.plan, len(calls) - 1
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2
    calls[index].wanted[0] = (case.expected(), tolerance, tolerance)
    row_bytes = case.q[0].numel() * dtype.itemsize
    parts: list[tuple[int, int, int, int]] = []
    for r, (num_rows, context, kind) in enumerate(requests):
        parts += [(r, 0, count, context) for count in {1, min(3, num_rows), num_rows}]
        parts += [(r, i, 1, context + i) for i in (1, 18, num_rows - 1) if kind == "chain" and 0 < i < num_rows]
    for r, skipped, count, context in parts:
        if plan.bidirectional and (skipped or count < requests[r][0]):
            continue
        own = slice(plan.query_start[r] + skipped, plan.query_start[r] + skipped + count)
        part = plan_tree_attention(
            query_lens=[count],
            context_lens=[context],
            page_table=plan.page_table[r : r + 1],
            parents=plan.parents[own] - skipped,
            page_size=plan.page_size,
            is_chain=[requests[r][2] == "chain"],
            bidirectional=plan.bidirectional,
        )
        _attend(AttentionCase(plan=part, q=case.q[own], k_pages=case.k_pages, v_pages=case.v_pages))
        of = slice(own.start * row_bytes, own.stop * row_bytes)
        calls[-1].parts.append(Part(whole=index, output=0, own=slice(None), of=of))


def _candidates(calls: list[Call]) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in _DTYPES:
        # More than 262144 logits make larger blocks.
        largest = [(262_145, 7, 0)] if dtype is torch.float32 else []
        for vocab, width, rank in [(1, 1, 0), (40, 40, 1), (64, 16, 33), (1025, 16, 64), *largest]:
            # Distinct within a row, in bf16 too as far as it goes: equal logits leave torch's order open.
            values = torch.linspace(-30, 4, vocab).repeat(2, 3, 1)
            values[..., : min(vocab, 64)] = torch.linspace(5, 12, min(vocab, 64))
            logits = values.gather(2, torch.rand(2, 3, vocab, generator=generator).argsort(-1)).to(dtype)
            factors = torch.randn(2, vocab, rank, generator=generator) * max(rank, 1) ** -0.5
            _add_candidates(calls, logits, width, (factors[0].to(dtype), factors[1].to(dtype)) if rank else None)
    for broken in _NOT_NUMBERS:
        logits = torch.randn(3, 2, 200, generator=generator)
        logits[0] = broken
        logits[1, 1, 5:] = broken
        logits[2, 0, 150] = broken
        factors = torch.full((200, 4), 3.0), torch.randn(200, 4, generator=generator)
        _add_candidates(calls, logits, 8, factors, has_order=False)


def _add_candidates(
    calls: list[Call],
    logits: torch.Tensor,
    width: int,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    has_order: bool = True,
) -> None:
    """All requests, then each alone."""
    assert draft_candidates(logits, width=width, sharpness=1.4, factors=factors) is not None
    index, num = len(calls) - 1, len(logits)
    if has_order:
        sidecar = None if factors is None else SimpleNamespace(parent=factors[0].float(), child=factors[1].float())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coupled, "draft_candidates", lambda logits, **options: None)
            tables = candidate_tables(
                logits, width=width, anchor_ids=[0] * num, sampling=[None] * num, sidecar=sidecar, sharpness=1.4
            )
        calls[index].wanted[0] = (torch.stack([table.ids for table in tables]), 0, 0)
        # 16 units are 2.4e-4 nats; scores far below are less precise in fp32.
        calls[index].wanted[2] = (torch.stack([table.scores for table in tables]), 1e-5, 16)
    for r in range(num):
        assert draft_candidates(logits[r : r + 1], width=width, sharpness=1.4, factors=factors) is not None
        for i, content in enumerate(calls[index].answers):
            size = len(content) // num
            of = slice(r * size, (r + 1) * size)
            calls[-1].parts.append(Part(whole=index, output=i, own=slice(None), of=of))


def _trees(calls: list[Call]) -> None:
    """Ties, roots alone, biases, shared budgets and prices; that Python grows the same is in test_cpu_trees."""
    rng = random.Random(7)
    for spread in (0, 1, 7, 1 << 14, 1 << 18):
        for num in (1, 2, 9, 30):
            tables = [None if rng.random() < 0.1 else _table(rng, spread) for _ in range(num)]
            max_nodes = [rng.choice([1, 2, 8, 33]) for _ in range(num)]
            budget = rng.randint(num, sum(max_nodes) + 3)
            steps = [rng.choice([0, 1, 5, 400]) for _ in range(budget + 1)]
            build_trees(
                tables,
                [rng.randrange(9) for _ in range(num)],
                max_nodes=max_nodes,
                max_depths=[rng.choice([0, 1, 3, 99]) for _ in range(num)],
                verify_budget=budget,
                biases=[rng.choice([0, -5, 1 << 15]) for _ in range(num)],
                row_costs=None if rng.random() < 0.3 else 100 + np.cumsum(steps),
            )


def _table(rng: random.Random, spread: int) -> CandidateTable:
    depth, width = rng.randint(1, 9), rng.randint(1, 16)
    draw = np.random.default_rng(rng.randrange(2**32))
    scores = -draw.integers(0, spread, (depth, width if rng.random() < 0.7 else 1, width), endpoint=True)
    ids = torch.from_numpy(draw.integers(0, 50000, (depth, width)))
    return CandidateTable(ids=ids, scores=torch.from_numpy(scores.astype(np.int32)))


def _maps(calls: list[Call]) -> None:
    """Maps, and maps that are none; each depth alone through its own."""
    draw = np.random.default_rng(5)
    for low in (1 << 10, -(1 << 15)):
        maps = torch.from_numpy(np.cumsum(draw.integers(low, 1 << 15, (NUM_DEPTHS, NUM_KNOTS)), -1).astype(np.int32))
        for shape in [(1, 1, 1), (9, 16, 16), (11, 1, 7)]:
            scores = torch.from_numpy(-draw.integers(0, -MIN_SCORE, shape, endpoint=True).astype(np.int32))
            assert trees.map_scores(scores, maps, knot_shift=KNOT_SHIFT, worst=-MIN_SCORE) is not None
            index, size = len(calls) - 1, 4 * shape[1] * shape[2]
            for depth in range(shape[0]):
                own = min(depth, NUM_DEPTHS - 1)
                part = scores[depth : depth + 1], maps[own : own + 1]
                assert trees.map_scores(*part, knot_shift=KNOT_SHIFT, worst=-MIN_SCORE) is not None
                of = slice(depth * size, (depth + 1) * size)
                calls[-1].parts.append(Part(whole=index, output=0, own=slice(None), of=of))
