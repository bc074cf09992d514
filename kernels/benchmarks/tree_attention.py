"""Times `tree_attention` beside `scaled_dot_product_attention` with a dense mask and, on a GPU, beside FlexAttention.

Both baselines have their K and V contiguous already, which the op does not ask for. Run as
``PYTHONPATH=.:kernels python kernels/benchmarks/tree_attention.py --output DIR``. The op's test is run first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measuring import Row, median_us, run

from jetflow_kernels.tree_attention import TreeAttentionPlan, plan_tree_attention, tree_attention

PAGE_SIZE = 16
#: Query heads, KV heads and head size: the embedded model's on a CPU, those of Qwen3-8B on a GPU.
SHAPES = {"cpu": (8, 4, 64), "cuda": (32, 8, 128)}
CASES = {
    "cpu": [(batch, rows, context) for batch in (1, 8, 32) for rows in (1, 16, 64) for context in (200, 1000)],
    "cuda": [
        (batch, rows, context)
        for batch in (1, 8, 32)
        for rows in (1, 16, 64, 128, 256)
        for context in (128, 1024, 8192, 32768)
        if batch * context <= 300_000
    ],
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch of equal trees over scattered pages, and the same K and V contiguous."""

    plan: TreeAttentionPlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dense_q: torch.Tensor
    dense_k: torch.Tensor
    dense_v: torch.Tensor
    #: bool ``[rows, rows]``: a tree's ancestors.
    ancestors: torch.Tensor
    context: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.q.shape[2] ** -0.5)

    def paged(self) -> torch.Tensor:
        """The op, as every layer behind the first calls it."""
        return tree_attention(self.plan, self.q, self.k, self.v, scale=self.scale)

    def num_bytes(self) -> int:
        """What must move: the K and V of all keys, q, and the output."""
        return self.dense_k.nbytes + self.dense_v.nbytes + 2 * self.q.nbytes


def make_inputs(batch: int, rows: int, context: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random values; both layouts hold the same ones, so that results can be compared."""
    heads, kv_heads, head_dim = SHAPES[device]
    keys = rows + context
    pages = -(-keys // PAGE_SIZE)
    table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages).to(device)
    dense_k, dense_v = (torch.randn(batch, keys, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    slots = (table.long()[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)).view(batch, -1)[:, :keys]
    paged = []
    for dense in (dense_k, dense_v):
        pool = torch.zeros(batch * pages, PAGE_SIZE, kv_heads, head_dim, dtype=dtype, device=device)
        pool.view(-1, kv_heads, head_dim)[slots.flatten()] = dense.flatten(0, 1)
        paged.append(pool)
    parents = [-1] + [(i - 1) // 2 for i in range(1, rows)]
    ancestors = torch.eye(rows, dtype=torch.bool)
    for i in range(1, rows):
        ancestors[i] |= ancestors[parents[i]]
    q = torch.randn(batch * rows, heads, head_dim, dtype=dtype, device=device)
    plan = plan_tree_attention(
        query_lens=[rows] * batch,
        context_lens=[context] * batch,
        page_table=table,
        parents=torch.tensor(parents, dtype=torch.int32).repeat(batch).to(device),
        page_size=PAGE_SIZE,
        is_chain=[rows == 1] * batch,
    )
    return Inputs(
        plan=plan,
        q=q,
        k=paged[0],
        v=paged[1],
        dense_q=q.view(batch, rows, heads, head_dim).transpose(1, 2).contiguous(),
        dense_k=dense_k.transpose(1, 2).contiguous(),
        dense_v=dense_v.transpose(1, 2).contiguous(),
        ancestors=ancestors.to(device),
        context=context,
    )


def dense_call(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """`scaled_dot_product_attention` under a dense mask."""
    rows, keys = inputs.ancestors.shape[0], inputs.dense_k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool, device=inputs.q.device)
    mask[:, inputs.context :] = inputs.ancestors
    q, k, v = inputs.dense_q, inputs.dense_k, inputs.dense_v
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def flex_call(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ancestors, context = inputs.ancestors, inputs.context
    rows, keys = ancestors.shape[0], inputs.dense_k.shape[2]

    def sees(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        del b, h
        return (key < context) | ancestors[row, (key - context).clamp(0, rows - 1)]

    block_mask = create_block_mask(sees, None, None, rows, keys, device=str(inputs.q.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = inputs.dense_q, inputs.dense_k, inputs.dense_v

    def call() -> torch.Tensor:
        out: torch.Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        return out

    return call


def measure(batch: int, rows: int, context: int, dtype: torch.dtype, device: str, bandwidth: float) -> Row:
    """One row of the table. Raises AssertionError where the baselines disagree with the op."""
    inputs = make_inputs(batch, rows, context, dtype, device)
    calls = {"dense_sdpa": dense_call(inputs)} | ({"flex_attention": flex_call(inputs)} if device == "cuda" else {})
    expected = inputs.paged().view(batch, rows, *inputs.q.shape[1:]).transpose(1, 2)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    ours = median_us(inputs.paged, device)
    row: Row = {"batch": batch, "rows": rows, "context": context, "dtype": str(dtype).removeprefix("torch.")}
    row |= {
        "tree_attention_us": ours,
        "share_of_copy_bandwidth": inputs.num_bytes() / (ours * 1e-6) / bandwidth,
    }
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected, atol=tolerance, rtol=tolerance)
        theirs = median_us(call, device)
        row |= {f"{name}_us": theirs, f"ratio_to_{name}": ours / theirs}
    return row


def rows_on(device: str, bandwidth: float) -> Iterator[Row]:
    """The whole table."""
    for dtype in DTYPES[device]:
        for case in CASES[device]:
            yield measure(*case, dtype, device, bandwidth)
            if device == "cuda":
                # FlexAttention is compiled anew for every shape.
                torch._dynamo.reset()


if __name__ == "__main__":
    run("tree_attention", rows_on, __doc__ or "")
