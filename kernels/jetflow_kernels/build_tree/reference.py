"""The definition, with a heap."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import accumulate

import torch

from jetflow_kernels.build_tree.buffers import VALUE_UNIT, Candidates, RowLayout, TreeBuffers, TreeLimits

#: Score, depth, ranks from the root, parent.
_Node = tuple[int, int, tuple[int, ...], int]


def build_tree_reference(candidates: Candidates, limits: TreeLimits, out: TreeBuffers) -> None:
    """See `jetflow_kernels.build_tree.build_tree`."""
    rows = limits.requests.tolist()
    grown = [
        _grow(candidates.scores[r].tolist(), min(max_nodes, out.num_nodes), max_depth, width)
        for r, (max_nodes, max_depth, width, _) in enumerate(rows)
    ]
    biases = [row[3] for row in rows]
    order = sorted(
        (-(score + biases[r]), depth, ranks, r) for r, nodes in enumerate(grown) for score, depth, ranks, _ in nodes[1:]
    )
    num_roots = sum(bool(nodes) for nodes in grown)
    order = order[: max(0, int(limits.budget) - num_roots)]
    if limits.cost is not None and limits.value_table is not None and num_roots:
        table = limits.value_table.tolist()
        values = [table[min(-min(-key, 0) >> 8, len(table) - 1)] for key, *_ in order]
        order = order[: _best_prefix(num_roots, values, limits.cost.tolist())]
    taken = [r for *_, r in order]
    counts = [taken.count(r) + bool(nodes) for r, nodes in enumerate(grown)]
    out.counts.copy_(torch.tensor(counts, dtype=torch.int32))
    out.row_start.copy_(torch.tensor([0, *accumulate(counts)], dtype=torch.int32))
    for r, count in enumerate(counts):
        ids = candidates.ids[r].tolist()
        for i, (score, depth, ranks, parent) in enumerate(grown[r][:count]):
            out.token_ids[r, i] = ids[depth - 1][ranks[-1]] if depth else int(limits.anchor_ids[r])
            out.parents[r, i], out.depths[r, i], out.scores[r, i] = parent, depth, score


def _grow(scores: list[list[list[int]]], max_nodes: int, max_depth: int, width: int) -> list[_Node]:
    """The best nodes of one request by score, depth and ranks, the root first."""
    nodes: list[_Node] = []
    heap: list[tuple[int, int, tuple[int, ...], int]] = [(0, 0, (), -1)]
    while heap and len(nodes) < max_nodes:
        negated, depth, ranks, parent = heappop(heap)
        if depth < min(max_depth, len(scores)):
            table = scores[depth]
            row = table[ranks[-1] if ranks and len(table) > 1 else 0]
            for rank in range(min(width, len(row))):
                heappush(heap, (negated - row[rank], depth + 1, (*ranks, rank), len(nodes)))
        nodes.append((-negated, depth, ranks, parent))
    return nodes


def _best_prefix(num_roots: int, values: list[int], cost: list[int]) -> int:
    """The n for which n nodes give the most expected tokens per price; the smallest of equals."""
    best, tokens, best_tokens = 0, num_roots * VALUE_UNIT, num_roots * VALUE_UNIT
    for n, value in enumerate(values, 1):
        tokens += value
        if tokens * cost[num_roots + best] > best_tokens * cost[num_roots + n]:
            best, best_tokens = n, tokens
    return best


def lay_out_rows_reference(
    trees: TreeBuffers,
    out: RowLayout,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    pad_slot: int,
    tile_rows: int,
) -> None:
    """See `jetflow_kernels.build_tree.lay_out_rows`."""
    for tensor, value in ((out.token_ids, 0), (out.positions, 0), (out.slot_mapping, pad_slot)):
        tensor.fill_(value)
    out.ancestor_bits.zero_()
    out.tiles.fill_(-1)
    num_tiles = 0
    for r, count in enumerate(trees.counts.tolist()):
        first, context = int(trees.row_start[r]), int(context_lens[r])
        out.requests[r] = torch.tensor([first, count, context, 0])
        for i in range(count):
            out.token_ids[first + i] = trees.token_ids[r, i]
            out.positions[first + i] = context + trees.depths[r, i]
            page = int(page_table[r, (context + i) // page_size])
            out.slot_mapping[first + i] = page * page_size + (context + i) % page_size
            node = i
            while node >= 0:
                out.ancestor_bits[first + i, node // 32] |= torch.tensor(1 << node % 32).to(torch.int32)
                node = int(trees.parents[r, node])
        for start in range(0, count, tile_rows):
            out.tiles[num_tiles] = torch.tensor([r, start])
            num_tiles += 1
