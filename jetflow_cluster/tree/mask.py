"""Who sees whom in a tree: a node sees its ancestors and itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ancestor_mask(parents: Sequence[int]) -> torch.Tensor:
    """bool ``[n, n]``: row i is true at node i and its ancestors.

    Args:
        parents: parent of each node, smaller than the node; -1 for roots.
    """
    packed = _packed_bytes(parents)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, : len(parents)].bool()


def packed_ancestor_mask(parents: Sequence[int]) -> torch.Tensor:
    """int32 ``[n, ceil(n / 32)]``: node j is bit ``j % 32`` of word ``j // 32`` of its descendants' and its own row.

    Args:
        parents: parent of each node, smaller than the node; -1 for roots.
    """
    return _packed_bytes(parents).view(torch.int32)


def _packed_bytes(parents: Sequence[int]) -> torch.Tensor:
    """uint8 ``[n, 4 * ceil(n / 32)]``, the lowest node in the lowest bit."""
    num_bytes = -(-len(parents) // 32) * 4
    rows: list[int] = []
    for i, parent in enumerate(parents):
        rows.append((rows[parent] if parent >= 0 else 0) | 1 << i)
    data = bytearray(b"".join(row.to_bytes(num_bytes, "little") for row in rows))
    return torch.frombuffer(data, dtype=torch.uint8).view(len(parents), num_bytes)
