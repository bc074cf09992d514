"""What more than one op, or a layer of its own, computes of each vector alone. Plain torch, for every device; fp32 and
bf16 on a CPU go to `jetflow_kernels.cpu` where it is compiled."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from jetflow_kernels.cpu import rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dim, normalised in fp32 whatever the dtype, as `transformers` does.

    Args:
        x: ``[.., n]``.
        weight: ``[n]``, or what broadcasts with `x`; of the same dtype.
        eps: added to the mean square.
    """
    if (out := rows.rms_norm(x, weight, eps)) is not None:
        return out
    if x.dtype is torch.float64:
        # Written out, so that the rounding is that of `transformers` and the rest of a fp64 model can be compared.
        rounded = x.float()
        return (rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + eps)).double().mul_(weight)
    if not x.is_cpu:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype).mul_(weight)
    # Torch has no fused kernel on CPUs, and this is two thirds of what `F.rms_norm` is composed of there.
    size = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    normed = x * torch.addcmul(_scalar(eps), size, size, value=1.0 / x.shape[-1]).rsqrt_()
    return normed.mul_(weight) if x.dtype is torch.float32 else normed.to(x.dtype).mul_(weight)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` ``[T, n]`` of gate and up side by side, ``[T, 2 * n]``. `x` is left as it is."""
    if (out := rows.silu_mul(x)) is not None:
        return out
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


@lru_cache(maxsize=8)
def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads ``[T, H, head_dim]`` by angles ``[T, 1, head_dim]``. The first half of `sin` is negative, so that
    one roll serves both halves."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
