"""What turns the launches of a step into something that does them again: CUDA graphs, or the launches themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Recorder(Protocol):
    """Turns launches into something that does them again."""

    def record(self, launches: Callable[[], object]) -> Callable[[], object]:
        """What to call in place of `launches`, whose tensors stay where they are."""


class Executing:
    """Where nothing can be recorded: the launches themselves."""

    def record(self, launches: Callable[[], object]) -> Callable[[], object]:
        """The launches."""
        return launches


class CudaGraphs:
    """CUDA graphs, whose buckets share one pool of memory: only one runs at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, launches: Callable[[], object]) -> Callable[[], object]:
        """Runs the launches thrice, the last time recorded. The tensors that they read must stand for no request."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                launches()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Torch keeps a workspace of cuBLAS per stream. A graph's own comes from the pool, so that it lives as long, and
        # the next recording does not find it.
        torch._C._cuda_clearCublasWorkspaces()
        # Other threads, such as NCCL's, may go on talking to the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            launches()
        torch._C._cuda_clearCublasWorkspaces()
        return graph.replay
