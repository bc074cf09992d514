"""The path without kernel against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from support.rope_rows import EPS, make_rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (0, 2)], ids=str)
def test_against_the_definition(dtype: torch.dtype, tolerance: float, has_norm: bool, heads: tuple[int, int]) -> None:
    rows = make_rows(7, heads=heads, head_dim=10, dtype=dtype, has_norm=has_norm)
    expected = rows.expected()
    q = qk_norm_rope_store(*rows.arguments(), num_heads=rows.num_heads, eps=EPS)
    for found, wanted in zip((q, rows.k_pages, rows.v_pages), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_heads_that_do_not_fit_are_refused() -> None:
    rows = make_rows(2, heads=(4, 2), head_dim=10, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not hold 3 heads of q and 2 of k and v"):
        qk_norm_rope_store(*replace(rows, num_heads=3).arguments(), num_heads=3, eps=EPS)
