"""Inputs of `qk_norm_rope_store`, with pages full of NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store_reference

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class RopeRows:
    """Inputs of one call."""

    qkv: torch.Tensor
    norm_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    num_heads: int

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """In the op's order."""
        return self.qkv, self.norm_weight, self.cos, self.sin, self.slots, self.k_pages, self.v_pages

    def to(self, device: str) -> RopeRows:
        """A copy on a device; pages are never shared with the original."""
        moved = {
            name: value.clone().to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and both pages by the definition, in fp64; slots that are not written keep NaN."""
        values = [t.double() if t is not None and t.is_floating_point() else t for t in self.arguments()]
        k_pages, v_pages = values[5].clone(), values[6].clone()
        q = qk_norm_rope_store_reference(*values[:5], k_pages, v_pages, num_heads=self.num_heads, eps=EPS)
        return q, k_pages, v_pages


def make_rows(
    num_rows: int,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    has_norm: bool = True,
    padding: int = 0,
    page_size: int = 16,
) -> RopeRows:
    """Rows at scattered positions and slots, as siblings of a tree have them; the last `padding` rows have no slot."""
    generator = torch.Generator().manual_seed(num_rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_heads, num_kv_heads = heads
    num_pages = num_rows // page_size + 2
    positions = torch.randint(0, 4000, (num_rows, 1), generator=generator)
    angles = positions * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(num_pages * page_size, generator=generator)[:num_rows]
    slots[num_rows - padding :] = -1
    pages = torch.full((2, num_pages, page_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    return RopeRows(
        qkv=randn(num_rows, num_heads + 2 * num_kv_heads, head_dim),
        norm_weight=randn(num_heads + num_kv_heads, head_dim) if has_norm else None,
        cos=torch.cat((cos, cos), -1)[:, None].to(dtype),
        sin=torch.cat((-sin, sin), -1)[:, None].to(dtype),
        slots=slots,
        k_pages=pages[0],
        v_pages=pages[1],
        num_heads=num_heads,
    )
