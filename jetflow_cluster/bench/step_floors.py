"""Bytes that a step cannot avoid to move, and how long memory takes for them.

Weights are read once per pass, whatever the number of rows, and keys and values once per request. So a step with trees
reads the target, the head, the output layer twice and both contexts; one without reads the target, the output layer
and the target's context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_cluster.bench.step_shapes import Shape, blank_models, parameter_bytes
from jetflow_cluster.cache.kv_cache import bytes_per_page, kv_dtype
from jetflow_cluster.config import MAX_WIDTH
from jetflow_cluster.models.config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step to be measured."""

    batch_size: int
    #: Nodes of each tree, root included; 1 is no speculation.
    num_nodes: int
    #: Tokens in the cache of each request.
    prefix_len: int

    @property
    def num_rows(self) -> int:
        """Rows of the verify pass."""
        return self.batch_size * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """Of one shape in one dtype on one kind of device."""

    #: Layers of the target, without its two ends.
    target: int
    lm_head: int
    head: int
    #: Keys and values of one token.
    target_kv: int
    draft_kv: int
    #: One logit, and the vocabulary.
    logit: int
    vocab_size: int
    max_depth: int

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> ModelBytes:
        """From the shapes alone; nothing is allocated."""
        target, head = blank_models(shape, dtype)
        end = target.embedding.weight.numel() * dtype.itemsize
        ends = end if shape.target.tie_word_embeddings else 2 * end
        return cls(
            target=parameter_bytes(target) - ends,
            lm_head=end,
            head=parameter_bytes(head),
            target_kv=_token_bytes(shape.target, dtype, device),
            draft_kv=_token_bytes(shape.head, dtype, device),
            logit=dtype.itemsize,
            vocab_size=shape.target.vocab_size,
            max_depth=shape.head.block_size - 1,
        )

    def stages(self, point: Point) -> dict[str, int]:
        """Bytes of each stage, and of the parts of the passes."""
        speculates = point.num_nodes > 1
        context = point.batch_size * point.prefix_len
        attention = context * self.target_kv
        # A table is written and read.
        table = 2 * point.batch_size * self.max_depth * MAX_WIDTH * (8 + 4)
        return {
            "draft": self.head + self.lm_head + context * self.draft_kv if speculates else 0,
            "build": table if speculates else 0,
            "verify": self.target + self.lm_head + attention,
            "accept": point.num_rows * self.vocab_size * self.logit,
            "commit": 2 * point.batch_size * self.target_kv,
            "attention": attention,
            "GEMMs": self.target,
            "lm_head": self.lm_head,
            "head": self.head if speculates else 0,
        }

    def step(self, point: Point) -> int:
        """Bytes of the whole step by which its floor is defined: those of the two passes."""
        stages = self.stages(point)
        return stages["draft"] + stages["verify"]


def _token_bytes(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> int:
    return bytes_per_page(
        num_layers=config.num_layers,
        page_size=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype(dtype, device),
    )


def floor_rows(sizes: ModelBytes, points: list[Point], bandwidth: float) -> list[dict[str, object]]:
    """Rows of the results without any time.

    Args:
        sizes: of the models.
        points: the steps.
        bandwidth: bytes per second, read and written together.
    """
    rows: list[dict[str, object]] = []
    for point in points:
        for stage, size in {**sizes.stages(point), "step": sizes.step(point)}.items():
            rows.append(row_of(point, stage, size, bandwidth, None))
    return rows


def row_of(point: Point, stage: str, num_bytes: int, bandwidth: float, seconds: float | None) -> dict[str, object]:
    """One row of the results; times in microseconds, None where nothing was measured or nothing must move."""
    floor = num_bytes / bandwidth
    return {
        "name": f"b{point.batch_size} n{point.num_nodes} p{point.prefix_len} {stage}",
        "batch_size": point.batch_size,
        "num_nodes": point.num_nodes,
        "prefix_len": point.prefix_len,
        "stage": stage,
        "time_us": seconds * 1e6 if seconds is not None else None,
        "num_bytes": num_bytes,
        "floor_us": floor * 1e6,
        "ratio_to_floor": seconds / floor if seconds is not None and num_bytes else None,
    }
