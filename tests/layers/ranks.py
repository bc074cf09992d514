"""Tensor-parallel ranks as threads of one process, and weights read as the loader reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from jetflow_cluster.layers.linear import Piece
from jetflow_cluster.parallel.tp_group import TpGroup

T = TypeVar("T")


class ThreadGroup(TpGroup):
    """One rank; all ranks share `parts` and `barrier`."""

    def __init__(self, rank: int, size: int, parts: list[torch.Tensor], barrier: threading.Barrier):
        super().__init__(rank, size)
        self._parts, self._barrier = parts, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = x.clone()
        self._barrier.wait(10)
        parts = list(self._parts)
        self._barrier.wait(10)
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), -1)


def on_ranks(size: int, work: Callable[[TpGroup], T]) -> list[T]:
    """What `work` returns on each rank."""
    if size == 1:
        return [work(TpGroup.single())]
    parts, barrier = [torch.empty(0)] * size, threading.Barrier(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, size, parts, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def fill(pieces: Iterable[Piece], full: dict[str, torch.Tensor]) -> None:
    """Copies the parts of whole tensors to where they go."""
    for name, shape, slices, destination in pieces:
        assert full[name].shape == shape
        destination.copy_(full[name][slices])
