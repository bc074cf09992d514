"""Figures of others, with their sources, and the cost model that they give for Qwen3-8B on a GPU.

Nothing in this file was measured by this project. Sources: [paper] arXiv 2606.18394; [card] the models' published
configurations; [vendor] NVIDIA's data sheet of the H200 SXM; [assumed] no source was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jetflow_cluster.engine.cost_model import CostModel

#: Rows at which the curves have knots.
_KNOTS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device, and how it talks to its neighbours."""

    name: str = "H200"
    #: Peak bytes per second of its memory [vendor].
    memory_bytes_per_s: float = 4.8e12
    #: Peak bf16 operations per second, dense [vendor].
    flops: float = 989e12
    #: Bytes of its memory [vendor].
    memory_bytes: float = 141e9
    #: Share of the peak memory rate that a decoding engine reaches. [paper, table 11: 127.8 tokens per second of an 8 B
    #: model on an H100 of 3.35 TB/s are 0.58 of it]
    memory_share: float = 0.58
    #: Share of the peak operations that wide passes reach [assumed].
    flops_share: float = 0.6
    #: Seconds of one all-reduce of a small message between two and four neighbours [assumed].
    all_reduce_s: float = 10e-6
    #: Bytes per second and direction between neighbours [vendor: 900 GB/s both ways].
    link_bytes_per_s: float = 450e9

    def __post_init__(self) -> None:
        for name in ("memory_bytes_per_s", "flops", "memory_bytes", "memory_share", "flops_share", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A target and its head."""

    name: str = "Qwen3-8B"
    num_layers: int = 36
    hidden_size: int = 4096
    #: Parameters that a pass reads: all but the embedding [card: 8.19 B, less 0.62 B].
    num_parameters: float = 7.57e9
    bytes_per_parameter: int = 2
    #: Keys and values of one token: 36 layers, 2 x 8 heads of 128, 2 bytes [card].
    kv_bytes: int = 36 * 2 * 8 * 128 * 2
    #: Parameters that a guess reads: 1.05 B of the head and 0.62 B of the target's vocabulary [card].
    num_draft_parameters: float = 1.67e9
    #: Draft context of one token: 5 layers, 2 x 8 heads of 128, 2 bytes [card].
    draft_kv_bytes: int = 5 * 2 * 8 * 128 * 2
    #: Slots of a block [card].
    block_size: int = 16
    #: Seconds of a guess over those of a pass, at batch 1 [paper, table 12: 0.135 to 0.138 on an H200 NVL].
    draft_share: float = 0.137


#: Mean tokens per step by nodes, greedy, the bonus counted [paper, tables 1 (16 and 32 nodes) and 2]. The seven columns
#: are GSM8K, MATH500, AIME25, HumanEval, MBPP, LiveCodeBench, MT-Bench.
PUBLISHED_LENGTHS: Mapping[int, tuple[float, ...]] = {
    16: (6.00, 7.75, 7.23, 5.32, 4.96, 6.24, 3.98),
    32: (6.14, 8.23, 7.25, 5.35, 5.03, 6.48, 4.09),
    64: (6.56, 7.42, 7.00, 6.06, 5.88, 6.59, 4.77),
    128: (8.05, 9.95, 9.10, 7.28, 6.95, 8.21, 5.52),
    256: (8.62, 10.76, 9.82, 7.78, 7.43, 8.79, 5.94),
}
#: What is simulated: a name, and the columns whose mean it is.
TASKS: Mapping[str, tuple[int, ...]] = {"mean of seven tasks": tuple(range(7)), "MATH500": (1,), "MT-Bench": (6,)}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def lengths_of(columns: tuple[int, ...]) -> dict[int, float]:
    """Mean tokens per step by nodes, for `SIZES`.

    A larger tree holds a smaller one, so where the published figure falls the smaller tree's stays. Below 16 nodes
    nothing was published: there a chain is taken whose guesses are right with one constant probability, the one that
    gives the figure of 16 nodes [assumed].
    """
    published = {n: float(np.mean([row[c] for c in columns])) for n, row in PUBLISHED_LENGTHS.items()}
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _chain(middle, 16) < published[16] else (low, middle)
    found: dict[int, float] = {}
    best = 1.0
    for n in SIZES:
        best = max(best, published.get(n, _chain(low, n)))
        found[n] = best
    return found


def _chain(right: float, num_nodes: int) -> float:
    return sum(right**k for k in range(num_nodes))


def gpu_costs(gpu: Gpu, model: ServedModel, tp_size: int, *, draft_tp_size: int | None = None) -> CostModel:
    """What a step costs by published figures.

    A pass takes the longer of reading the weights and computing its rows, each shared by the ranks, and two all-reduces
    per layer. A guess takes the published share of a pass for its reading, and the same rate of computing.

    Args:
        gpu: each rank's device.
        model: what runs.
        tp_size: ranks of the target.
        draft_tp_size: ranks of the head; None is those of the target, 1 a dedicated worker's.
    """
    drafts_on = draft_tp_size or tp_size
    bytes_per_s = gpu.memory_bytes_per_s * gpu.memory_share
    rows = np.array(_KNOTS, dtype=np.float64)
    read_s = model.num_parameters * model.bytes_per_parameter / bytes_per_s
    pass_s = _pass_s(gpu, model, model.num_parameters, read_s, rows, tp_size, model.num_layers)
    guess_s = _pass_s(gpu, model, model.num_draft_parameters, model.draft_share * read_s, rows, drafts_on, 5)
    return CostModel(
        row_knots=tuple(rows),
        row_s=tuple(pass_s),
        draft_knots=tuple(rows),
        draft_s=tuple(guess_s),
        context_s=model.kv_bytes / bytes_per_s / tp_size,
        draft_context_s=model.draft_kv_bytes / bytes_per_s / drafts_on,
        source=f"published figures of {gpu.name} and {model.name}; not measured",
    )


def _pass_s(
    gpu: Gpu, model: ServedModel, parameters: float, read_s: float, rows: np.ndarray, ranks: int, layers: int
) -> np.ndarray:
    compute_s = 2.0 * parameters * rows / (gpu.flops * gpu.flops_share)
    found: np.ndarray = np.maximum(read_s, compute_s) / ranks
    if ranks > 1:
        message_s = rows * model.hidden_size * model.bytes_per_parameter / gpu.link_bytes_per_s
        found = found + 2 * layers * (gpu.all_reduce_s + message_s)
    return found


def most_requests(gpu: Gpu, model: ServedModel, tp_size: int, context: int, *, has_head: bool) -> int:
    """Requests of so many tokens whose keys and values fit beside the weights, a tenth of the memory left free."""
    weights = (model.num_parameters + 0.62e9) * model.bytes_per_parameter / tp_size
    head = 1.05e9 * model.bytes_per_parameter / tp_size if has_head else 0.0
    per_token = (model.kv_bytes + (model.draft_kv_bytes if has_head else 0)) / tp_size
    return int((0.9 * gpu.memory_bytes - weights - head) / (per_token * context))
