"""`tree_attention` against its definition, with NaN in every slot that must not be read."""

from __future__ import annotations

import random

import pytest
import torch

from jetflow_kernels.tree_attention import plan_tree_attention, tree_attention, tree_attention_reference

#: Rows, context length, and shape of each request.
Requests = list[tuple[int, int, str]]

BATCHES: dict[str, Requests] = {
    "one-token-no-context": [(1, 0, "chain")],
    "one-token": [(1, 33, "chain")],
    "tokens-of-equal-length": [(1, 20, "chain")] * 3,
    "tokens-of-odd-lengths": [(1, 0, "chain"), (1, 16, "chain"), (1, 41, "chain")],
    "one-tree": [(16, 37, "tree")],
    "tree-without-context": [(9, 0, "tree")],
    "trees-of-odd-sizes": [(2, 1, "tree"), (16, 31, "tree"), (33, 5, "tree")],
    "prompt-chunk": [(40, 8, "chain")],
    "everything": [(50, 3, "chain"), (1, 17, "chain"), (12, 30, "tree"), (1, 0, "chain"), (7, 64, "tree")],
    "page-borders": [(16, 16, "tree"), (1, 31, "chain"), (17, 15, "chain")],
}


def _parents(shape: str, count: int, rng: random.Random) -> list[int]:
    return list(range(-1, count - 1)) if shape == "chain" else [-1] + [rng.randrange(i) for i in range(1, count)]


def _compare(
    requests: Requests,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float64,
    pages_dtype: torch.dtype | None = None,
    bidirectional: bool = False,
    consecutive: bool = False,
    tolerance: float = 1e-12,
) -> None:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    counts = [-(-(rows + context) // page_size) for rows, context, _ in requests]
    ids = list(range(sum(counts) + 2))
    if not consecutive:
        rng.shuffle(ids)
    shape = (len(ids), page_size, heads[1], head_dim)
    k, v = (torch.full(shape, float("nan"), dtype=pages_dtype or dtype) for _ in range(2))
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    parents: list[int] = []
    for r, (rows, context, kind) in enumerate(requests):
        pages = [ids.pop(0) for _ in range(counts[r])]
        table[r, : counts[r]] = torch.tensor(pages, dtype=torch.int32)
        for slot in range(rows + context):
            for pages_of in (k, v):
                value = torch.randn(heads[1], head_dim, generator=generator, dtype=torch.float64)
                pages_of[pages[slot // page_size], slot % page_size] = value.to(dtype)
        parents += _parents(kind, rows, rng)
    plan = plan_tree_attention(
        query_lens=[rows for rows, _, _ in requests],
        context_lens=[context for _, context, _ in requests],
        page_table=table,
        parents=torch.tensor(parents, dtype=torch.int32),
        page_size=page_size,
        bidirectional=bidirectional,
    )
    q = torch.randn(len(parents), heads[0], head_dim, generator=generator, dtype=torch.float64).to(dtype)
    expected = tree_attention_reference(plan, q.double(), k.double(), v.double(), scale=head_dim**-0.5)
    for _ in range(2):
        out = tree_attention(plan, q, k, v, scale=head_dim**-0.5)
        assert out.dtype == dtype
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
