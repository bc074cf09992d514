"""Ragged batches for attention, with NaN in every slot that must not be read."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from jetflow_kernels.tree_attention import TreeAttentionPlan, plan_tree_attention, tree_attention_reference

#: Rows, context length, and shape of each request.
Requests = list[tuple[int, int, str]]

BATCHES: dict[str, Requests] = {
    "one-token-no-context": [(1, 0, "chain")],
    "one-token": [(1, 33, "chain")],
    "tokens-of-equal-length": [(1, 20, "chain")] * 3,
    "tokens-of-odd-lengths": [(1, 0, "chain"), (1, 16, "chain"), (1, 41, "chain")],
    "one-tree": [(16, 37, "tree")],
    "tree-without-context": [(9, 0, "tree")],
    "trees-of-odd-sizes": [(2, 1, "tree"), (16, 31, "tree"), (33, 5, "tree")],
    "prompt-chunk": [(40, 8, "chain")],
    "everything": [(50, 3, "chain"), (1, 17, "chain"), (12, 30, "tree"), (1, 0, "chain"), (7, 64, "tree")],
    "page-borders": [(16, 16, "tree"), (1, 31, "chain"), (17, 15, "chain")],
}


@dataclass(kw_only=True)
class AttentionCase:
    """Inputs of one call."""

    plan: TreeAttentionPlan
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    def expected(self) -> torch.Tensor:
        """By the definition, in fp64."""
        q, k, v = (t.double() for t in (self.q, self.k_pages, self.v_pages))
        return tree_attention_reference(self.plan, q, k, v, scale=q.shape[2] ** -0.5)

    def to(self, device: str) -> AttentionCase:
        """The same on another device."""
        plan = self.plan
        moved = plan_tree_attention(
            query_lens=plan.query_lens,
            context_lens=plan.context_lens,
            page_table=plan.page_table.to(device),
            parents=plan.parents.to(device),
            page_size=plan.page_size,
            bidirectional=plan.bidirectional,
            is_chain=plan.is_chain,
        )
        q, k, v = (t.to(device) for t in (self.q, self.k_pages, self.v_pages))
        return AttentionCase(plan=moved, q=q, k_pages=k, v_pages=v)


def make_case(
    requests: Requests,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float64,
    pages_dtype: torch.dtype | None = None,
    bidirectional: bool = False,
    consecutive: bool = False,
    seed: int = 0,
) -> AttentionCase:
    """Random rows and contexts on the CPU, on scattered pages or on consecutive ones."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [-(-(rows + context) // page_size) for rows, context, _ in requests]
    ids = list(range(sum(counts) + 2))
    if not consecutive:
        rng.shuffle(ids)
    shape = (len(ids), page_size, heads[1], head_dim)
    k, v = (torch.full(shape, float("nan"), dtype=pages_dtype or dtype) for _ in range(2))
    table = torch.zeros(len(requests), max(counts, default=0), dtype=torch.int32)
    parents: list[int] = []
    for r, (rows, context, kind) in enumerate(requests):
        pages = [ids.pop(0) for _ in range(counts[r])]
        table[r, : counts[r]] = torch.tensor(pages, dtype=torch.int32)
        for slot in range(rows + context):
            for pages_of in (k, v):
                value = torch.randn(heads[1], head_dim, generator=generator, dtype=torch.float64)
                pages_of[pages[slot // page_size], slot % page_size] = value.to(dtype)
        parents += list(range(-1, rows - 1)) if kind == "chain" else [-1] + [rng.randrange(i) for i in range(1, rows)]
    plan = plan_tree_attention(
        query_lens=[rows for rows, _, _ in requests],
        context_lens=[context for _, context, _ in requests],
        page_table=table,
        parents=torch.tensor(parents, dtype=torch.int32),
        page_size=page_size,
        bidirectional=bidirectional,
    )
    q = torch.randn(len(parents), heads[0], head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionCase(plan=plan, q=q, k_pages=k, v_pages=v)
