"""Times `commit_kv` beside its definition: all slots gathered, then scattered.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/commit_kv.py --output DIR``. The op's test is run first. On a
CPU the definition is what serves, so there both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measuring import Row, median_us, run

from jetflow_kernels.commit_kv import commit_kv, commit_kv_reference

PAGE_SIZE = 16
#: Layers, KV heads and head size: the embedded model's on a CPU, those of Qwen3-8B on a GPU.
SHAPES = {"cpu": (4, 4, 64), "cuda": (36, 8, 128)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Requests, and moves of each.
CASES = ((1, 4), (1, 15), (8, 4), (64, 6))


def measure(num_requests: int, num_moves: int, device: str, bandwidth: float) -> Row:
    """One row of the table: paths of trees of 64 nodes. Raises AssertionError where the two disagree."""
    num_layers, num_kv_heads, head_dim = SHAPES[device]
    pages_each = 64 // PAGE_SIZE
    shape = (num_layers, 2, num_requests * pages_each, PAGE_SIZE, num_kv_heads, head_dim)
    kv = torch.randn(shape, dtype=DTYPES[device], device=device)
    first = torch.arange(num_requests)[:, None] * 64
    path = torch.stack([torch.randperm(63)[:num_moves].sort().values + 1 for _ in range(num_requests)])
    source, target = (first + path).to(device), (first + 1 + torch.arange(num_moves)).to(device)
    expected = kv.clone()
    found = kv.clone()
    commit_kv(found, source, target)
    commit_kv_reference(expected, source, target)
    assert torch.equal(found, expected), "the moves differ from the definition"
    ours_us = median_us(lambda: commit_kv(found, source, target), device)
    theirs_us = median_us(lambda: commit_kv_reference(expected, source, target), device)
    num_bytes = 2 * kv[:, :, 0, 0].nbytes * source.numel()
    return {
        "requests": num_requests,
        "moves": num_moves,
        "dtype": str(kv.dtype).removeprefix("torch."),
        "commit_kv_us": ours_us,
        "share_of_copy_bandwidth": num_bytes / (ours_us * 1e-6) / bandwidth,
        "reference_us": theirs_us,
        "ratio_to_reference": ours_us / theirs_us,
    }


def rows_on(device: str, bandwidth: float) -> Iterator[Row]:
    """The whole table."""
    for num_requests, num_moves in CASES:
        yield measure(num_requests, num_moves, device, bandwidth)


if __name__ == "__main__":
    run("commit_kv", rows_on, __doc__ or "")
