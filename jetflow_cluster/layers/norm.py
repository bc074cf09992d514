"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dim, normalised in fp32 whatever the dtype, as `transformers` does.

    Args:
        x: ``[.., n]``.
        weight: ``[n]``, or what broadcasts with `x`; of the same dtype.
        eps: added to the mean square.
    """
    if x.dtype is torch.float64:
        # Written out, so that the rounding is that of `transformers` and the rest of a fp64 model can be compared.
        rounded = x.float()
        return (rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + eps)).double().mul_(weight)
    if not x.is_cpu:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype).mul_(weight)
    # The CPU has no fused kernel, and this is two thirds of what `F.rms_norm` is composed of there.
    size = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    normed = x * torch.addcmul(_scalar(eps), size, size, value=1.0 / x.shape[-1]).rsqrt_()
    return normed.mul_(weight) if x.dtype is torch.float32 else normed.to(x.dtype).mul_(weight)


@lru_cache(maxsize=8)
def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


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
