"""The ranks that share one model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class TpGroup:
    """Collectives of one tensor-parallel group; a group of one does nothing."""

    def __init__(self, rank: int, size: int, process_group: Any = None):
        if not 0 <= rank < size:
            raise ValueError(f"rank = {rank}: must be in [0, {size - 1}]")
        self.rank, self.size = rank, size
        self._group = process_group

    @classmethod
    def single(cls) -> TpGroup:
        """The group of one rank."""
        return cls(0, 1)

    @classmethod
    def from_process_group(cls, process_group: Any = None) -> TpGroup:
        """The ranks of an initialised `torch.distributed` group; None is the default group."""
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)

    @classmethod
    def imagined(cls, size: int) -> TpGroup:
        """Rank 0 of a group whose other ranks are not there: what it would hold can be planned, nothing computed."""
        return _ImaginedGroup(0, size)

    @property
    def may_be_recorded(self) -> bool:
        """Whether a CUDA graph may hold its collectives: NCCL's, but not Gloo's, which run on the host."""
        return self.size == 1 or bool(dist.get_backend(self._group) == "nccl")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self._group)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, dist.get_global_rank(self._group, 0) if self._group is not None else 0, group=self._group)
        return x

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.int64, device=self._device())
        dist.all_reduce(held, dist.ReduceOp.MIN, group=self._group)
        return int(held)

    def _device(self) -> torch.device:
        is_nccl = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors side by side along the last dim, rank 0 first."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, -1)


class _ImaginedGroup(TpGroup):
    @property
    def may_be_recorded(self) -> bool:
        return True

    def smallest(self, value: int) -> int:
        return value
