"""Compiled attention of CPUs against the definition, and a row's result in every batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jetflow_kernels.cpu import attention, cpu_kernels
from jetflow_kernels.tree_attention import plan_tree_attention
from support.attention_batches import BATCHES, AttentionCase, make_case

pytestmark = pytest.mark.skipif(cpu_kernels().functions is None, reason="no compiled CPU kernels")

DTYPES = [pytest.param(torch.float32, 2e-6, id="fp32"), pytest.param(torch.bfloat16, 1e-2, id="bf16")]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _attend(case: AttentionCase) -> torch.Tensor:
    out = attention.tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=case.q.shape[2] ** -0.5)
    assert out is not None, "left to scaled_dot_product_attention"
    assert out.dtype is case.q.dtype and out.shape == case.q.shape
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bidirectional": True},
        {"heads": (8, 2), "head_dim": 64},
        {"heads": (6, 1), "head_dim": 80},
        {"heads": (4, 4), "head_dim": 128, "page_size": 1},
        {"heads": (1, 1), "head_dim": 256, "page_size": 7},
    ],
    ids=lambda shape: "-".join(map(str, shape.values())) or "usual",
)
def test_every_batch(name: str, shape: dict, dtype: torch.dtype, tolerance: float) -> None:
    """Slots that no row sees are NaN."""
    case = make_case(BATCHES[name], dtype=dtype, pages_dtype=torch.float32, **shape)
    torch.testing.assert_close(_attend(case).double(), case.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_large_trees_and_long_contexts(dtype: torch.dtype, tolerance: float, threads: int) -> None:
    case = make_case([(300, 5, "tree"), (2, 700, "tree"), (90, 200, "chain")], dtype=dtype, pages_dtype=torch.float32)
    torch.testing.assert_close(_attend(case).double(), case.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype, head_dim: int, threads: int) -> None:
    """Of each request the first row alone, the first few, and all of it alone: bit for bit what they are together."""
    requests = [(13, 75, "tree"), (1, 64, "chain"), (40, 3, "chain"), (8, 200, "tree")] * 3
    case = make_case(requests, heads=(8, 4), head_dim=head_dim, dtype=dtype, pages_dtype=torch.float32)
    together = _attend(case)
    plan = case.plan
    for r, (num_rows, context, kind) in enumerate(requests):
        first = plan.query_start[r]
        for count in {1, min(3, num_rows), num_rows}:
            rows = slice(first, first + count)
            part = plan_tree_attention(
                query_lens=[count],
                context_lens=[context],
                page_table=plan.page_table[r : r + 1],
                parents=plan.parents[rows],
                page_size=plan.page_size,
                is_chain=[kind == "chain"],
            )
            alone = AttentionCase(plan=part, q=case.q[rows], k_pages=case.k_pages, v_pages=case.v_pages)
            assert torch.equal(_attend(alone), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 7), (128, 16)])
def test_a_node_has_the_bits_of_its_token_without_the_tree(dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    """Each node of a tree, and the same keys in a row with nothing between them."""
    num_nodes, context = 40, 53
    case = make_case(
        [(num_nodes, context, "tree")],
        heads=(4, 2),
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        pages_dtype=torch.float32,
        consecutive=True,
    )
    out = _attend(case)
    parents = case.plan.parents.tolist()
    keys, values = (pages.flatten(0, 1) for pages in (case.k_pages, case.v_pages))
    first = int(case.plan.page_table[0, 0]) * page_size
    for node in range(num_nodes):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        slots = torch.tensor([first + i for i in (*range(context), *(context + n for n in path))])
        num_pages = -(-len(slots) // page_size)
        pages = torch.zeros(2, num_pages * page_size, *keys.shape[1:])
        pages[0, : len(slots)], pages[1, : len(slots)] = keys[slots], values[slots]
        plan = plan_tree_attention(
            query_lens=[1],
            context_lens=[len(slots) - 1],
            page_table=torch.arange(num_pages, dtype=torch.int32)[None],
            parents=torch.tensor([-1], dtype=torch.int32),
            page_size=page_size,
        )
        k, v = pages.unflatten(1, (num_pages, page_size))
        alone = AttentionCase(plan=plan, q=case.q[node : node + 1], k_pages=k, v_pages=v)
        assert torch.equal(_attend(alone)[0], out[node]), f"node {node} of depth {len(path)}"


def test_chains_and_trees_of_the_same_rows_agree() -> None:
    """A chain told as a tree, and rows that lie apart."""
    case = make_case([(9, 21, "chain"), (4, 0, "chain")], dtype=torch.float32)
    plan = case.plan
    told = plan_tree_attention(
        query_lens=plan.query_lens,
        context_lens=plan.context_lens,
        page_table=plan.page_table.long(),
        parents=plan.parents,
        page_size=plan.page_size,
        is_chain=[False, False],
    )
    apart = torch.zeros(13, 2, *case.q.shape[1:])
    apart[:, 1] = case.q
    for q in (case.q, apart[:, 1]):
        out = _attend(AttentionCase(plan=told, q=q, k_pages=case.k_pages, v_pages=case.v_pages))
        assert torch.equal(out, _attend(case))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "pages_dtype"),
    [
        (16, torch.float64, torch.float64),
        (16, torch.float16, torch.float32),
        (16, torch.bfloat16, torch.bfloat16),
        (24, torch.float32, torch.float32),
        (272, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_what_is_not_served(head_dim: int, dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
    case = make_case(BATCHES["one-tree"], head_dim=head_dim, dtype=dtype, pages_dtype=pages_dtype)
    assert attention.tree_attention(case.plan, case.q, case.k_pages, case.v_pages, scale=0.1) is None


@pytest.mark.parametrize("page", [-1, 10**6])
def test_pages_that_are_not_there(page: int) -> None:
    case = make_case(BATCHES["trees-of-odd-sizes"], dtype=torch.float32)
    case.plan.page_table[1, 1] = page
    with pytest.raises(IndexError, match="page_table"):
        _attend(case)


def test_tensors_without_memory() -> None:
    case = make_case(BATCHES["one-tree"], dtype=torch.float32)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (case.q, case.k_pages, case.v_pages))
        assert attention.tree_attention(case.plan, q, k, v, scale=0.1) is None
