"""The Triton kernel against the definition; see `test_interpreted.py` for how these run."""

from __future__ import annotations

import random

import pytest
import torch

from jetflow_kernels.commit_kv import commit_kv, commit_kv_reference
from support.sparse_memory import sparse_tensor


def paths(rng: random.Random, lengths: list[int], num_slots: int, num_nodes: int) -> tuple[list[int], ...]:
    """Moves of ascending paths of several requests on scattered slots, and how many each has."""
    free = rng.sample(range(num_slots), num_nodes * len(lengths))
    source: list[int] = []
    target: list[int] = []
    counts = []
    for request, length in enumerate(lengths):
        slots = free[request * num_nodes :][:num_nodes]
        nodes = [0, *sorted(rng.sample(range(1, num_nodes), length - 1))]
        moves = [(slots[node], slots[i]) for i, node in enumerate(nodes) if node != i]
        source += [move[0] for move in moves]
        target += [move[1] for move in moves]
        counts.append(len(moves))
    return source, target, counts


def compare(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor, device: str) -> None:
    expected, moved = kv.clone(), kv.clone().to(device)
    commit_kv_reference(expected, source, target)
    commit_kv(moved, source.to(device), target.to(device))
    torch.testing.assert_close(moved.cpu(), expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [[2], [16], [40], [5, 1, 9], [30, 30]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_accepted_paths(lengths: list[int], dtype: torch.dtype, device: str) -> None:
    kv = torch.randn(2, 2, 13, 16, 2, 24).to(dtype)
    source, target, counts = paths(random.Random(0), lengths, 13 * 16, 60)
    compare(kv, torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64), device)
    table = torch.full((2, len(lengths), max(counts)), -1, dtype=torch.int64)
    for request, count in enumerate(counts):
        first = sum(counts[:request])
        table[0, request, :count] = torch.tensor(source[first : first + count])
        table[1, request, :count] = torch.tensor(target[first : first + count])
    compare(kv, table[0], table[1], device)


def test_a_long_shift_by_one_slot(device: str) -> None:
    # Every target is the source of the move before it.
    compare(torch.randn(1, 2, 4, 16, 1, 8), torch.arange(3, 60), torch.arange(2, 59), device)


def test_all_of_sixteen_moves_are_read_before_any_is_written(device: str) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    compare(torch.randn(1, 2, 1, 16, 3, 200), order, torch.arange(16), device)


def test_nothing_to_move(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    compare(torch.randn(1, 2, 1, 16, 1, 8), none, none, device)
    compare(torch.randn(1, 2, 1, 16, 1, 8), torch.full((2, 3), -1), torch.full((2, 3), -1), device)


def test_slots_past_32_bits(device: str) -> None:
    num_pages = 2**32 // (16 * 64) // 2 + 2
    kv = sparse_tensor((2, 2, num_pages, 16, 1, 64), torch.float16, device)
    last = (num_pages - 1) * 16
    kv[1, 1, -1, 9], kv[1, 1, -1, 4] = 2.0, 1.0
    commit_kv(kv, torch.tensor([last + 9], device=device), torch.tensor([last + 4], device=device))
    assert kv[1, 1, -1].sum(-1)[:, 0].tolist() == [128.0 if slot in (4, 9) else 0.0 for slot in range(16)]
