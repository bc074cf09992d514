"""Calls of `trees.c`. Each returns None where it cannot serve; the caller's Python does the same then."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from jetflow_kernels.cpu.library import cpu_kernels

#: As in `trees.c`.
_MAX_DEPTH = 128
#: Nodes that there is room made for: more is asked for where all that a table holds is wanted.
_MOST_ROOM = 1 << 20
#: Fields of a request there.
_NUM_FIELDS = 8

#: Token ids, parents, depths and scores of a tree's nodes.
Nodes = tuple[list[int], list[int], list[int], list[int]]


def grow_trees(
    tables: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    anchor_ids: Sequence[int],
    *,
    num_left: Sequence[int],
    max_depths: Sequence[int],
    total_left: int,
    biases: Sequence[int],
    costs: torch.Tensor | None,
    values: torch.Tensor,
) -> list[Nodes] | None:
    """The trees of `jetflow_cluster.tree.build.build_trees`.

    Args:
        tables: ids int64 ``[D, W]`` and scores int32 ``[D, P, W]`` of each request, on the CPU; None is a bare root.
        anchor_ids: token of each root.
        num_left: most nodes of each tree beside its root; 0 where there is no table.
        max_depths: deepest node of each tree.
        total_left: most nodes of all trees beside their roots.
        biases: of each request.
        costs: int64 ``[total_left + 1]``, with 0 to all such nodes, contiguous; None is no price.
        values: int64, expected tokens by score, contiguous.
    """
    functions = cpu_kernels().functions
    num, room = len(tables), 1 + max(num_left, default=0)
    if functions is None or num * room > _MOST_ROOM:
        return None
    fields: list[int] = []
    # What the addresses point at must live as long as the call.
    held = []
    for table, left, depth, bias in zip(tables, num_left, max_depths, biases, strict=True):
        if table is None or not left:
            fields += [0] * _NUM_FIELDS
            continue
        ids, scores = table[0].contiguous(), table[1].contiguous()
        if ids.shape[0] > _MAX_DEPTH or not (_is_read(ids, torch.int64) and _is_read(scores, torch.int32)):
            return None
        held.append((ids, scores))
        fields += (ids.data_ptr(), scores.data_ptr(), ids.shape[0], scores.shape[1], ids.shape[1], left, depth, bias)
    out = torch.empty((4, num, room), dtype=torch.int64)
    counts = (ctypes.c_int64 * num)()
    failed = functions.held.grow_trees(
        (ctypes.c_int64 * len(fields))(*fields),
        num,
        total_left,
        None if costs is None else costs.data_ptr(),
        0 if costs is None else len(costs),
        values.data_ptr(),
        len(values),
        out.data_ptr(),
        room,
        counts,
    )
    if failed:
        return None
    found: list[Nodes] = []
    for anchor, n, *nodes in zip(anchor_ids, counts, *out.tolist(), strict=True):
        token_ids, parents, depths, found_scores = ([root, *nodes[i][1:n]] for i, root in enumerate((anchor, -1, 0, 0)))
        found.append((token_ids, parents, depths, found_scores))
    return found


def map_scores(scores: torch.Tensor, maps: torch.Tensor, *, knot_shift: int, worst: int) -> torch.Tensor | None:
    """Scores through the map of their depth; see `jetflow_cluster.engine.value_model.apply_maps`.

    Args:
        scores: int32 ``[D, P, W]``.
        maps: int32 ``[num_depths, num_knots]`` of the request's kind, contiguous; the last serves all deeper ones.
        knot_shift: distance of the knots, as a shift.
        worst: the worst score, negated.
    """
    functions = cpu_kernels().functions
    if functions is None or not (_is_read(scores, torch.int32) and _is_read(maps, torch.int32)):
        return None
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    num_depths, num_parents, width = scores.shape
    functions.held.map_scores(
        scores.data_ptr(),
        num_depths,
        num_parents * width,
        maps.data_ptr(),
        maps.shape[0],
        maps.shape[1],
        knot_shift,
        worst,
        out.data_ptr(),
    )
    return out


def _is_read(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """True for what `trees.c` may read as being of this dtype."""
    return x.is_cpu and x.dtype is dtype
