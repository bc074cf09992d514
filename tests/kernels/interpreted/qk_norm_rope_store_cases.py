"""The Triton kernel against the definition; see `test_interpreted.py` for how these run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from support.rope_rows import EPS, RopeRows, make_rows
from support.sparse_memory import sparse_tensor

TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def compare(rows: RopeRows, device: str) -> None:
    expected = rows.expected()
    moved = rows.to(device)
    q = qk_norm_rope_store(*moved.arguments(), num_heads=rows.num_heads, eps=EPS)
    tolerance = TOLERANCE[rows.qkv.dtype]
    for found, wanted in zip((q, moved.k_pages, moved.v_pages), expected, strict=True):
        assert found.dtype == rows.qkv.dtype
        torch.testing.assert_close(found.cpu().double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype, device: str) -> None:
    compare(make_rows(5, heads=(2, 1), head_dim=head_dim, dtype=dtype), device)


@pytest.mark.parametrize("num_rows", [1, 31, 33, 70])
@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (0, 2)], ids=str)
def test_rows_and_heads(num_rows: int, heads: tuple[int, int], device: str) -> None:
    compare(make_rows(num_rows, heads=heads, head_dim=64, dtype=torch.float32), device)


@pytest.mark.parametrize("heads", [(4, 2), (0, 1)], ids=str)
def test_models_without_norm(heads: tuple[int, int], device: str) -> None:
    compare(make_rows(9, heads=heads, head_dim=64, dtype=torch.float32, has_norm=False), device)


@pytest.mark.parametrize("page_size", [1, 48])
def test_rows_that_fill_a_batch_up_store_nothing(page_size: int, device: str) -> None:
    compare(make_rows(40, heads=(1, 1), head_dim=64, dtype=torch.float32, padding=11, page_size=page_size), device)


def test_rows_may_be_strided(device: str) -> None:
    rows = make_rows(6, heads=(2, 2), head_dim=64, dtype=torch.float32)
    wide = torch.cat((rows.qkv, torch.full_like(rows.qkv, float("nan"))), 1)
    moved = rows.to(device)
    moved = replace(moved, qkv=wide.to(device)[:, : rows.qkv.shape[1]])
    q = qk_norm_rope_store(*moved.arguments(), num_heads=2, eps=EPS)
    torch.testing.assert_close(q.cpu().double(), rows.expected()[0], atol=4e-6, rtol=4e-6)


def test_slots_past_32_bits(device: str) -> None:
    rows = make_rows(4, heads=(1, 2), head_dim=64, dtype=torch.float16)
    expected, moved = rows.expected(), rows.to(device)
    first = 2**32 // rows.k_pages[0].numel()
    shape = (first + len(rows.k_pages), *rows.k_pages.shape[1:])
    far = [sparse_tensor(shape, torch.float16, device) for _ in range(2)]
    moved = replace(moved, slots=moved.slots + first * shape[1], k_pages=far[0], v_pages=far[1])
    qk_norm_rope_store(*moved.arguments(), num_heads=1, eps=EPS)
    for pages, wanted in zip(far, expected[1:], strict=True):
        found = pages[first:].cpu().double()
        torch.testing.assert_close(found, wanted.nan_to_num(0.0), atol=4e-3, rtol=4e-3)
        assert not pages[: len(rows.k_pages)].any(), "slots were counted in 32 bits"


def test_what_does_not_fit_is_refused(device: str) -> None:
    rows = make_rows(4, heads=(2, 1), head_dim=48, dtype=torch.float32).to(device)
    with pytest.raises(NotImplementedError, match="head_dim = 48: qk_norm_rope_store has kernels for 64"):
        qk_norm_rope_store(*rows.arguments(), num_heads=2, eps=EPS)
    rows = make_rows(4, heads=(2, 1), head_dim=64, dtype=torch.float32).to(device)
    assert rows.norm_weight is not None
    half = replace(rows, norm_weight=rows.norm_weight.half())
    with pytest.raises(ValueError, match=r"norm_weight torch\.float16"):
        qk_norm_rope_store(*half.arguments(), num_heads=2, eps=EPS)
    turned = replace(rows, qkv=rows.qkv.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="contiguous"):
        qk_norm_rope_store(*turned.arguments(), num_heads=2, eps=EPS)
