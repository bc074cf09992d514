"""Rotary position embedding, default and YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from jetflow_kernels.pointwise import rotate

__all__ = ["RopeConfig", "Rotary", "inverse_frequencies", "rotate", "yarn_attention_factor"]


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
    #: YaRN: with this many rotations over the original context a frequency is kept as it is.
    beta_fast: float = 32.0
    #: YaRN: with this few it is stretched in full.
    beta_slow: float = 1.0
    #: YaRN: multiplier of cos and sin; None derives it from the factor.
    attention_factor: float | None = None
    #: YaRN: round the borders between kept and stretched frequencies outwards to whole dimensions.
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "yarn"):
            raise ValueError(f"rope_type = {self.rope_type!r}: supported are 'default' and 'yarn'")
        if self.rope_type == "yarn" and self.original_max_position_embeddings < 1:
            length = self.original_max_position_embeddings
            raise ValueError(f"original_max_position_embeddings = {length}: must be at least 1")


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Multiplier of cos and sin where a configuration gives none."""
    if factor <= 1:
        return 1.0
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """fp32 ``[head_dim / 2]`` and the multiplier of cos and sin, rounded as `transformers` rounds them."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    wavelengths = config.theta**steps
    if config.rope_type == "default":
        return 1.0 / wavelengths, 1.0
    attention = config.attention_factor
    if attention is None:
        attention = yarn_attention_factor(config.factor)

    def dim_of(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast), dim_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept, attention


#: Positions that are computed at once, so that a position's angles do not depend on when they were; and how many a CPU
#: keeps, 8 MB of fp32 at a head_dim of 128.
_BLOCK, _MOST_KEPT = 1024, 8192


class Rotary:
    """Cos and sin of positions; made once per batch and used by all layers. A CPU keeps them: to look a step's few
    positions up takes a fifth of the time that it takes to compute them."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device):
        # A model that is only described is on the meta device, where a range would have torch load its compiler.
        where = torch.device("cpu") if device.type == "meta" else device
        self._frequencies, self._scale = inverse_frequencies(config, head_dim, where)
        #: cos and sin by dtype, of positions 0, 1 and so on, as far as they were asked for.
        self._kept: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def angles(
        self, positions: torch.Tensor, dtype: torch.dtype, max_position: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each ``[T, 1, head_dim]``, of int64 positions ``[T]``, of which `max_position` is the highest
        where the host knows it.

        They are computed in fp32 whatever the dtype, as `transformers` does. The first half of sin is negative, so
        that one roll serves both halves of `rotate`.
        """
        if positions.is_cpu and max_position is not None and max_position < _MOST_KEPT:
            cos, sin = self._table(max_position + 1, dtype)
            return cos.index_select(0, positions), sin.index_select(0, positions)
        return self._computed(positions, dtype)

    def _table(self, num: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The angles of so many positions or more."""
        kept = self._kept.get(dtype)
        if kept is None or kept[0].shape[0] < num:
            blocks = range(0, num, _BLOCK)
            # Not of inference mode, for whoever else looks them up.
            with torch.inference_mode(False):
                parts = [self._computed(torch.arange(first, first + _BLOCK), dtype) for first in blocks]
                kept = torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])
            self._kept[dtype] = kept
        return kept

    def _computed(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None].to(torch.float32) * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return (
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )
