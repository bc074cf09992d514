"""The Triton kernel against the definition; see `test_interpreted.py` for how these run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jetflow_kernels.tree_attention import kernel as op
from jetflow_kernels.tree_attention import tree_attention
from jetflow_kernels.tree_attention.metadata import Capacity, TreeAttentionMetadata
from support.attention_batches import BATCHES, AttentionCase, Requests, make_case
from support.sparse_memory import sparse_tensor

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def compare(case: AttentionCase, device: str, num_splits: int | None = None) -> None:
    compare_with(case.expected(), case.to(device), num_splits)


def compare_with(expected: torch.Tensor, moved: AttentionCase, num_splits: int | None = None) -> None:
    metadata = op.make_metadata(moved.plan, moved.q, moved.k_pages.shape[2])
    if num_splits is not None:
        metadata = replace(metadata, num_splits=num_splits)
    out = op.attend(metadata, moved.q, moved.k_pages, moved.v_pages, scale=moved.q.shape[2] ** -0.5)
    assert out.dtype == moved.q.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BATCHES)
def test_ragged_batches(name: str, device: str) -> None:
    compare(make_case(BATCHES[name], head_dim=64, dtype=torch.float32), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "one-token"])
def test_half_types(name: str, dtype: torch.dtype, device: str) -> None:
    compare(make_case(BATCHES[name], head_dim=64, dtype=dtype), device)


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((2, 2), 80, torch.float16),
        ((4, 1), 96, torch.float32),
        ((5, 1), 128, torch.float16),
        ((8, 1), 256, torch.bfloat16),
        ((10, 2), 128, torch.float32),
        ((2, 1), 256, torch.float32),
    ],
    ids=str,
)
def test_head_sizes_and_groups(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> None:
    compare(make_case(BATCHES["page-borders"], heads=heads, head_dim=head_dim, dtype=dtype), device)


@pytest.mark.parametrize("page_size", [16, 48, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_page_sizes(page_size: int, dtype: torch.dtype, device: str) -> None:
    requests: Requests = [(7, 150, "tree"), (1, 130, "chain")]
    compare(make_case(requests, heads=(2, 1), head_dim=64, page_size=page_size, dtype=dtype), device)


@pytest.mark.parametrize("name", ["trees-of-odd-sizes", "prompt-chunk"])
def test_bidirectional_blocks(name: str, device: str) -> None:
    compare(make_case(BATCHES[name], head_dim=64, dtype=torch.float32, bidirectional=True), device)


@pytest.mark.parametrize("num_splits", [2, 3, 5])
@pytest.mark.parametrize("requests", [[(1, 300, "chain")], [(9, 200, "tree"), (1, 3, "chain"), (20, 129, "chain")]])
def test_keys_split_over_programs(requests: Requests, num_splits: int, device: str) -> None:
    compare(make_case(requests, heads=(2, 1), head_dim=64, dtype=torch.float32), device, num_splits)


def test_the_largest_tree(device: str) -> None:
    compare(make_case([(512, 70, "tree")], heads=(1, 1), head_dim=64, dtype=torch.float16), device)


def test_slots_past_32_bits(device: str) -> None:
    # Element numbers that wrap to the first pages, where NaN lies, when they are counted in 32 bits.
    case = make_case([(5, 40, "tree"), (1, 20, "chain")], heads=(2, 2), head_dim=64, dtype=torch.float16)
    per_page = case.k_pages[0].numel()
    first = 2**32 // per_page
    expected = case.expected()
    moved = case.to(device)
    far = []
    for pages in (moved.k_pages, moved.v_pages):
        far.append(sparse_tensor((first + len(pages), *pages.shape[1:]), pages.dtype, device))
        far[-1][: len(pages)] = float("nan")
        far[-1][first:] = pages
    moved.plan.page_table.add_(first)
    compare_with(expected, replace(moved, k_pages=far[0], v_pages=far[1]))


def test_an_empty_batch(device: str) -> None:
    case = make_case([], head_dim=64, dtype=torch.float32).to(device)
    assert tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=1.0).shape == (0, 4, 64)


def test_a_head_size_without_kernel_is_refused(device: str) -> None:
    case = make_case(BATCHES["one-token"], head_dim=48, dtype=torch.float32).to(device)
    with pytest.raises(NotImplementedError, match="head_dim = 48: tree_attention has kernels for 64, 80, 96, 128, 256"):
        tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=1.0)


def test_too_many_heads_on_a_kv_head_are_refused(device: str) -> None:
    case = make_case(BATCHES["one-token"], heads=(17, 1), head_dim=64, dtype=torch.float32).to(device)
    with pytest.raises(ValueError, match="17 query heads share a KV head: at most 16"):
        tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=1.0)


def test_rows_may_be_strided(device: str) -> None:
    case = make_case(BATCHES["one-tree"], head_dim=64, dtype=torch.float32)
    wide = torch.cat((case.q, torch.full_like(case.q, float("nan"))), 1)
    compare(replace(case, q=wide[:, : case.q.shape[1]]), device)


def test_one_metadata_for_many_batches(device: str) -> None:
    batches: list[Requests] = [
        [(12, 40, "tree"), (1, 9, "chain")],
        [(5, 70, "tree")],
        [(16, 3, "chain"), (4, 33, "tree")],
    ]
    capacity = Capacity(num_tiles=6, num_requests=3, num_rows=24, num_pages=8, num_words=1)
    metadata: TreeAttentionMetadata | None = None
    for seed, requests in enumerate(batches):
        case = make_case(requests, heads=(4, 2), head_dim=64, dtype=torch.float32, seed=seed)
        moved = case.to(device)
        if metadata is None:
            metadata = TreeAttentionMetadata.allocate(capacity, tile_rows=8, num_splits=2, device=torch.device(device))
        metadata.fill(moved.plan)
        q = torch.zeros(24, 4, 64, device=device)
        q[: len(case.q)] = moved.q
        out = op.attend(metadata, q, moved.k_pages, moved.v_pages, scale=0.125)
        torch.testing.assert_close(out[: len(case.q)].cpu().double(), case.expected(), atol=3e-6, rtol=3e-6)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    capacity = Capacity(num_tiles=1, num_requests=1, num_rows=4, num_pages=1, num_words=1)
    metadata = TreeAttentionMetadata.allocate(capacity, tile_rows=8, num_splits=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="num_rows=9"):
        metadata.fill(make_case([(9, 2, "tree")]).plan)


def test_the_op_itself_takes_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    attend = op.attend
    monkeypatch.setattr(op, "attend", lambda *args, **kwargs: calls.append(args) or attend(*args, **kwargs))
    case = make_case(BATCHES["everything"], head_dim=64, dtype=torch.float32)
    moved = case.to(device)
    for _ in range(2):
        out = tree_attention(moved.plan, moved.q, moved.k_pages, moved.v_pages, scale=0.125)
        torch.testing.assert_close(out.cpu().double(), case.expected(), atol=3e-6, rtol=3e-6)
    assert len(calls) == 2
    assert calls[0][0] is calls[1][0]
