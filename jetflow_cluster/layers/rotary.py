"""Rotary position embedding, default and YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Parameters of the rotation."""

    #: ``default`` or ``yarn``.
    rope_type: str = "default"
    #: Base of the frequencies.
    theta: float = 10000.0
    #: YaRN: how far the context is stretched.
    factor: float = 1.0
    #: YaRN: context length before stretching.
    original_max_position_embeddings: int = 0
    #: YaRN: rotations above which a frequency is kept, and below which it is fully stretched.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    #: YaRN: multiplier of cos and sin; None derives it from the factor.
    attention_factor: float | None = None


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """fp32 ``[head_dim / 2]`` and the multiplier of cos and sin."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    plain = 1.0 / (config.theta**steps)
    if config.rope_type == "default":
        return plain, 1.0
    attention = config.attention_factor
    if attention is None:
        attention = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    def dim_of(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(dim_of(config.beta_fast)), 0)
    high = min(math.ceil(dim_of(config.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return plain / config.factor * stretched + plain * (1 - stretched), attention


class Rotary:
    """Cos and sin of positions; computed once per batch and used by all layers."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device):
        self._frequencies, self._scale = inverse_frequencies(config, head_dim, device)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each ``[T, 1, head_dim]``, of int64 positions ``[T]``; angles are computed in fp32."""
        angles = positions[:, None].to(torch.float32) * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        # The first half is rotated by minus sine, so that one roll serves both halves.
        return (
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads ``[T, H, head_dim]`` by `Rotary.angles`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
