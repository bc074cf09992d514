"""Times `qk_norm_rope_store` beside the same in plain torch, one operation behind the other.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/qk_norm_rope_store.py --output DIR``. The op's test is run
first. On a CPU plain torch is what serves, and is timed beside the definition.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measuring import Row, median_us, run

from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from jetflow_kernels.qk_norm_rope_store.cpu import qk_norm_rope_store_cpu

PAGE_SIZE = 16
#: Query heads, KV heads and head size: the embedded model's on a CPU, those of Qwen3-8B on a GPU.
SHAPES = {"cpu": (8, 4, 64), "cuda": (32, 8, 128)}
ROWS = {"cpu": (1, 64, 256), "cuda": (1, 16, 128, 512, 2048)}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def measure(num_rows: int, dtype: torch.dtype, device: str, bandwidth: float) -> Row:
    """One row of the table. Raises AssertionError where the two disagree."""
    num_heads, num_kv_heads, head_dim = SHAPES[device]
    options = {"dtype": dtype, "device": device}
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, **options)
    weight = torch.rand(num_heads + num_kv_heads, head_dim, **options) + 0.5
    angles = torch.rand(num_rows, 1, head_dim // 2, **options) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles, angles), -1).sin()
    num_pages = -(-num_rows // PAGE_SIZE) + 1
    slots = torch.randperm(num_pages * PAGE_SIZE, device=device)[:num_rows]
    pages = [torch.zeros(2, num_pages, PAGE_SIZE, num_kv_heads, head_dim, **options) for _ in range(2)]
    plain = qk_norm_rope_store_reference if device == "cpu" else qk_norm_rope_store_cpu

    def ours() -> torch.Tensor:
        return qk_norm_rope_store(qkv, weight, cos, sin, slots, *pages[0], num_heads=num_heads, eps=1e-6)

    def theirs() -> torch.Tensor:
        return plain(qkv, weight, cos, sin, slots, *pages[1], num_heads=num_heads, eps=1e-6)

    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours(), theirs(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(pages[0], pages[1], atol=tolerance, rtol=tolerance)
    ours_us, theirs_us = median_us(ours, device), median_us(theirs, device)
    num_bytes = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
    return {
        "rows": num_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "qk_norm_rope_store_us": ours_us,
        "share_of_copy_bandwidth": num_bytes / (ours_us * 1e-6) / bandwidth,
        "plain_us": theirs_us,
        "ratio_to_plain": ours_us / theirs_us,
    }


def rows_on(device: str, bandwidth: float) -> Iterator[Row]:
    """The whole table."""
    for dtype in DTYPES[device]:
        for num_rows in ROWS[device]:
            yield measure(num_rows, dtype, device, bandwidth)


if __name__ == "__main__":
    run("qk_norm_rope_store", rows_on, __doc__ or "")
