"""`tree_attention` against its definition, with NaN in every slot that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jetflow_kernels.tree_attention import plan_tree_attention, tree_attention
from support.attention_batches import BATCHES, Requests, make_case


def _compare(requests: Requests, *, tolerance: float = 1e-12, **shape: Any) -> None:
    case = make_case(requests, **shape)
    scale = case.q.shape[2] ** -0.5
    expected = case.expected()
    for _ in range(2):
        out = tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=scale)
        assert out.dtype == case.q.dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BATCHES)
def test_ragged_batches(name: str) -> None:
    _compare(BATCHES[name])


@pytest.mark.parametrize("name", ["one-tree", "one-token", "prompt-chunk"])
def test_consecutive_pages(name: str) -> None:
    _compare(BATCHES[name], consecutive=True)


@pytest.mark.parametrize("name", ["one-tree", "trees-of-odd-sizes", "prompt-chunk"])
def test_bidirectional_blocks(name: str) -> None:
    _compare(BATCHES[name], bidirectional=True)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes_and_groups(heads: tuple[int, int], head_dim: int) -> None:
    _compare(BATCHES["everything"], heads=heads, head_dim=head_dim)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
def test_page_sizes(page_size: int) -> None:
    _compare(BATCHES["everything"], page_size=page_size)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    _compare(BATCHES["everything"], dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_queries_read_widened_pages(dtype: torch.dtype, tolerance: float) -> None:
    _compare(BATCHES["everything"], dtype=dtype, pages_dtype=torch.float32, tolerance=tolerance)


@pytest.mark.parametrize(
    ("dtype", "pages_dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str
)
def test_narrowed_pages_are_refused(dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="k_pages"):
        _compare(BATCHES["one-token"], dtype=dtype, pages_dtype=pages_dtype)


def test_largest_tree() -> None:
    _compare([(512, 5, "tree")], heads=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_lens": [1, 2]}, "context_lens"),
        ({"parents": torch.tensor([-1, 0])}, "parents has 2 rows"),
        ({"context_lens": [60]}, "do not fit"),
    ],
    ids=["counts", "parents", "pages"],
)
def test_plans_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    fits: dict[str, object] = {
        "query_lens": [3],
        "context_lens": [5],
        "page_table": torch.zeros(1, 2, dtype=torch.int32),
        "parents": torch.tensor([-1, 0, 1]),
        "page_size": 16,
    }
    plan_tree_attention(**fits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        plan_tree_attention(**(fits | change))  # type: ignore[arg-type]
