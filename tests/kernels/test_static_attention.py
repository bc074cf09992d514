"""Attention over tensors of fixed sizes beside the definition, in buckets that are larger than their batches."""

from __future__ import annotations

import random

import pytest
import torch

from jetflow_kernels.tree_attention import (
    HeadLayout,
    block_attention,
    plan_tree_attention,
    tree_attention,
    tree_attention_reference,
    tree_rows_attention,
)
from jetflow_kernels.tree_attention.metadata import ALL, CHAIN

PAGE_SIZE, NUM_PAGES, BUCKET_PAGES = 5, 40, 9


def pages(heads: HeadLayout) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (NUM_PAGES, PAGE_SIZE, heads.num_kv_heads, heads.head_dim)
    return torch.randn(shape, dtype=heads.dtype), torch.randn(shape, dtype=heads.dtype)


def heads_of(dtype: torch.dtype, group: int) -> HeadLayout:
    return HeadLayout(dtype=dtype, num_heads=2 * group, num_kv_heads=2, head_dim=8)


def tables(num: int) -> torch.Tensor:
    return torch.randperm(NUM_PAGES)[: num * 7].view(num, 7).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("query_lens", [[1], [7, 1, 3], [40, 2]], ids=["one node", "three trees", "two words"])
@pytest.mark.parametrize("group", [1, 3])
def test_trees(query_lens: list[int], dtype: torch.dtype, group: int) -> None:
    if max(query_lens) > 30:
        context_lens = [0] * len(query_lens) if len(query_lens) == 1 else [int(i > 0) * 4 for i in range(2)]
    else:
        context_lens = [3 * i for i in range(len(query_lens))]
    heads, rng, num = heads_of(dtype, group), random.Random(0), len(query_lens)
    table = torch.randperm(NUM_PAGES)[: num * BUCKET_PAGES].view(num, BUCKET_PAGES).to(torch.int32)
    parents = [rng.randrange(-1, i) if i else -1 for n in query_lens for i in range(n)]
    plan = plan_tree_attention(
        query_lens=query_lens,
        context_lens=context_lens,
        page_table=table,
        parents=torch.tensor(parents, dtype=torch.int32),
        page_size=PAGE_SIZE,
        is_chain=[False] * num,
    )
    num_rows, bucket_rows, bucket_requests = sum(query_lens), sum(query_lens) + 5, num + 2
    bits = torch.zeros(bucket_rows, 2, dtype=torch.int32)
    bits[:num_rows, : plan.ancestor_bits.shape[1]] = plan.ancestor_bits
    requests = torch.zeros(bucket_requests, 4, dtype=torch.int32)
    for r in range(num):
        requests[r] = torch.tensor([plan.query_start[r], query_lens[r], context_lens[r], 0])
    requests[num:, 0] = num_rows
    bucket_table = torch.zeros(bucket_requests, BUCKET_PAGES, dtype=torch.int32)
    bucket_table[:num] = table
    static = tree_rows_attention(
        heads,
        num_nodes=64,
        page_table=bucket_table,
        page_size=PAGE_SIZE,
        tiles=torch.full((bucket_rows, 2), -1, dtype=torch.int32),
        requests=requests,
        ancestor_bits=bits,
    )
    k, v = pages(heads)
    written = torch.zeros(NUM_PAGES * PAGE_SIZE, dtype=torch.bool)
    for r in range(num):
        slots = (table[r].long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        written[slots[: context_lens[r] + query_lens[r]]] = True
    for kv in (k, v):
        kv.view(-1, *kv.shape[2:])[~written] = float("nan")
    q = torch.randn(bucket_rows, heads.num_heads, heads.head_dim, dtype=dtype)
    found = tree_attention(static, q, k, v, scale=0.3)
    expected = tree_attention_reference(plan, q[:num_rows], k, v, scale=0.3)
    torch.testing.assert_close(found[:num_rows], expected, atol=1e-6 if dtype is torch.float32 else 1e-12, rtol=0)
    assert not found[num_rows:].any()


@pytest.mark.parametrize("mode", [CHAIN, ALL], ids=["causal", "bidirectional"])
def test_blocks_behind_contexts_that_are_written_later(mode: int) -> None:
    heads, table = heads_of(torch.float64, 2), tables(3)
    static = block_attention(
        heads, num_requests=3, rows_per_request=6, page_table=table, page_size=PAGE_SIZE, mode=mode
    )
    k, v = pages(heads)
    q = torch.randn(18, heads.num_heads, heads.head_dim, dtype=torch.float64)
    for context_lens in ([0, 11, 5], [29, 0, 1]):
        static.metadata.requests[:, 2] = torch.tensor(context_lens)
        plan = plan_tree_attention(
            query_lens=[6] * 3,
            context_lens=context_lens,
            page_table=table,
            parents=torch.tensor(list(range(-1, 5)) * 3, dtype=torch.int32),
            page_size=PAGE_SIZE,
            bidirectional=mode == ALL,
        )
        expected = tree_attention_reference(plan, q, k, v, scale=0.3)
        torch.testing.assert_close(tree_attention(static, q, k, v, scale=0.3), expected, atol=1e-12, rtol=0)
