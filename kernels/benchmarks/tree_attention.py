"""Times `tree_attention` beside `scaled_dot_product_attention` with a dense mask over contiguous K and V.

Run as ``PYTHONPATH=kernels python kernels/benchmarks/tree_attention.py --output DIR``. The op's test is run first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jetflow_kernels.tree_attention import plan_tree_attention, tree_attention

ROOT = Path(__file__).parent.parent.parent
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 4, 64, 16
CASES = [(batch, rows, context) for batch in (1, 8, 32) for rows in (1, 16, 64) for context in (200, 1000)]


def median_us(call: Callable[[], object], repeats: int = 30) -> float:
    """Median microseconds of a call, behind a few that do not count."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(batch: int, rows: int, context: int, dtype: torch.dtype) -> dict[str, float | int | str]:
    """One row of the table: per-layer time of both, and the plan's, which is paid once per step."""
    pages = -(-(rows + context) // PAGE_SIZE)
    table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages)
    k, v = (torch.randn(batch * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    q = torch.randn(batch * rows, HEADS, HEAD_DIM, dtype=dtype)
    parents = torch.tensor([-1] + [(i - 1) // 2 for i in range(1, rows)]).repeat(batch)

    def plan() -> object:
        made = plan_tree_attention(
            query_lens=[rows] * batch,
            context_lens=[context] * batch,
            page_table=table,
            parents=parents,
            page_size=PAGE_SIZE,
            is_chain=[rows == 1] * batch,
        )
        tree_attention(made, q, k, v, scale=HEAD_DIM**-0.5)
        return made

    made = plan()
    keys = rows + context
    dense_k, dense_v = (torch.randn(batch, HEADS, keys, HEAD_DIM, dtype=dtype) for _ in range(2))
    dense_q = torch.randn(batch, HEADS, rows, HEAD_DIM, dtype=dtype)
    mask = torch.zeros(batch, 1, rows, keys, dtype=dtype)
    ours = median_us(lambda: tree_attention(made, q, k, v, scale=HEAD_DIM**-0.5))  # type: ignore[arg-type]
    dense = median_us(lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v, attn_mask=mask))
    return {
        "batch": batch,
        "rows": rows,
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "tree_attention_us": ours,
        "plan_and_first_layer_us": median_us(plan, 10),
        "dense_sdpa_us": dense,
        "ratio_to_dense": ours / dense,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "kernels")
    output: Path = parser.parse_args().output
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/kernels"], cwd=ROOT, check=True)
    jobs = [(*case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in CASES]
    rows = [measure(*job) for job in track(jobs, description="tree_attention")]
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine | {"torch": torch.__version__}, "rows": rows}
    (output / "tree_attention.json").write_text(json.dumps(result, indent=1))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
