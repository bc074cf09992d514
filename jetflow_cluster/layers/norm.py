"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.linear import Piece


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dim, normalised in fp32 whatever the dtype, as `transformers` does."""
    if x.dtype is torch.float32:
        return (
            F.rms_norm(x, x.shape[-1:], None, eps) * weight
            if weight.ndim > 1
            else F.rms_norm(x, weight.shape, weight, eps)
        )
    if x.dtype is torch.float64:
        # Written out, so that the rounding is that of `transformers` and the rest of a fp64 model can be compared.
        rounded = x.float()
        normed = rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


class RmsNorm(nn.Module):
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
