"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece
from jetflow_kernels.pointwise import rms_norm

__all__ = ["RmsNorm", "rms_norm"]


class RmsNorm(InferenceModule):
    """`rms_norm` with a learned weight ``[size]``."""

    def __init__(self, name: str, size: int, eps: float):
        super().__init__()
        self._name, self._eps = name, eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return rms_norm(x, self.weight, self._eps)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", (self.weight.shape[0],), (slice(None),), self.weight
