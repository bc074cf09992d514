"""Runs models over pages without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jetflow_cluster.models.batch import ForwardBatch
from jetflow_kernels.tree_attention import plan_tree_attention

PAGE_SIZE = 4
#: Pages of up to four requests, out of order.
TABLE = torch.tensor([[3, 17, 5, 2, 29, 11, 8, 30], [1, 0, 22, 9, 4, 26, 7, 31], [13, 6, 12, 10, 21, 14, 16, 15]])
NUM_PAGES = 32


def make_batch(
    token_ids: Sequence[Sequence[int]], contexts: Sequence[int], parents: Sequence[Sequence[int] | None]
) -> ForwardBatch:
    """Rows of several requests; parents None is a chain."""
    rows, positions, slots, flat = [], [], [], []
    for r, (ids, context, tree) in enumerate(zip(token_ids, contexts, parents, strict=True)):
        local = list(range(-1, len(ids) - 1)) if tree is None else list(tree)
        depths: list[int] = []
        for parent in local:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        rows += list(ids)
        positions += [context + depth for depth in depths]
        slots += [int(TABLE[r, i // PAGE_SIZE]) * PAGE_SIZE + i % PAGE_SIZE for i in range(context, context + len(ids))]
        flat += local
    plan = plan_tree_attention(
        query_lens=[len(ids) for ids in token_ids],
        context_lens=list(contexts),
        page_table=TABLE[: len(token_ids)],
        parents=torch.tensor(flat),
        page_size=PAGE_SIZE,
    )
    return ForwardBatch(
        token_ids=torch.tensor(rows),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        attention=plan,
    )


def empty_kv(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Pages full of NaN, so that reading a slot that nobody wrote shows."""
    return torch.full((num_layers, 2, NUM_PAGES, PAGE_SIZE, num_kv_heads, head_dim), float("nan"), dtype=dtype)
