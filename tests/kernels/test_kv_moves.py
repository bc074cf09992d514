"""Stores and commits touch their slots and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jetflow_kernels.commit_kv import commit_kv
from jetflow_kernels.store_kv import store_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_store(dtype: torch.dtype) -> None:
    k_pages, v_pages = torch.zeros(3, 4, 2, 5, dtype=dtype), torch.zeros(3, 4, 2, 5, dtype=dtype)
    k, v = torch.randn(3, 2, 5, dtype=dtype), torch.randn(3, 2, 5, dtype=dtype)
    slots = torch.tensor([11, 0, 6])
    # Rows of a wider tensor, as a fused projection gives them.
    wide = torch.cat((k, v), 1)
    store_kv(wide[:, :2], wide[:, 2:], k_pages, v_pages, slots)
    for pages, rows in ((k_pages, k), (v_pages, v)):
        expected = torch.zeros(12, 2, 5, dtype=dtype)
        expected[slots] = rows
        assert torch.equal(pages.view(12, 2, 5), expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [([5], [2]), ([3, 5, 6], [2, 3, 4]), ([1, 0], [0, 1]), ([], []), ([[3, 5], [9, -1]], [[2, 3], [8, -1]])],
    ids=str,
)
def test_commit_reads_all_before_it_writes(source: list[Any], target: list[Any]) -> None:
    kv = torch.randn(2, 2, 3, 4, 2, 5)
    expected = kv.clone()
    for layer in range(2):
        for side in range(2):
            flat, before = expected[layer, side].view(12, 2, 5), kv[layer, side].view(12, 2, 5).clone()
            for s, t in zip(_flat(source), _flat(target), strict=True):
                if s >= 0:
                    flat[t] = before[s]
    commit_kv(kv, torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64))
    assert torch.equal(kv, expected)


def _flat(numbers: list[Any]) -> list[int]:
    return [n for row in numbers for n in row] if numbers and isinstance(numbers[0], list) else numbers


def test_slots_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"source_slots \(1,\) and target_slots \(2,\)"):
        commit_kv(torch.zeros(1, 2, 1, 4, 1, 2), torch.tensor([1]), torch.tensor([0, 1]))
