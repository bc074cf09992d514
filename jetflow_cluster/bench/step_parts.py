"""Time of the parts of a step's passes, each by itself, and of other implementations of attention beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from jetflow_cluster.bench.step_floors import Point
from jetflow_cluster.bench.timing import median_s
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.models.batch import layer_pages
from jetflow_cluster.models.qwen3 import Qwen3Layer
from jetflow_kernels.tree_attention import TreeAttentionPlan, plan_tree_attention, tree_attention

#: Dense copies of the keys above this size are not made.
_MOST_DENSE_BYTES = 8 * 2**30


@torch.inference_mode()
def part_times(
    engine: Engine, runner: TargetRunner, drafter: HeadDrafter, point: Point, *, repeats: int
) -> dict[str, float]:
    """Median seconds of all layers' attention, all layers' products, the output layer, and the head's pass; then of
    attention by dense `scaled_dot_product_attention` and, on CUDA, by FlexAttention."""
    model, device = runner.model, runner.device
    config = model.config
    plan = _attention_plan(engine, runner, point)
    x = torch.randn(point.num_rows, config.hidden_size, dtype=model.dtype, device=device)
    q = torch.randn(point.num_rows, config.num_heads, config.head_dim, dtype=model.dtype, device=device)
    works: dict[str, Callable[[], object]] = {
        "attention": lambda: [tree_attention(plan, q, k, v, scale=0.1) for k, v in layer_pages(runner.kv)],
        "GEMMs": lambda: _products(runner, x),
        "lm_head": lambda: model.compute_logits(x),
    }
    if point.num_nodes > 1:
        blocks = drafter.blocks(list(engine.requests.values()), drafter.max_depth)
        embeds = model.embed(blocks.batch.token_ids).to(drafter.head.dtype)
        works["head"] = lambda: drafter.head.forward(embeds, blocks.batch, drafter.kv)
    works |= _others(runner, point)
    return {name: median_s(work, device, repeats=repeats) for name, work in works.items()}


def tree_parents(num_nodes: int) -> list[int]:
    """A tree in which every node has two children."""
    return [(i - 1) // 2 if i else -1 for i in range(num_nodes)]


def _attention_plan(engine: Engine, runner: TargetRunner, point: Point) -> TreeAttentionPlan:
    for request in engine.requests.values():
        request.pages.ensure(point.prefix_len + point.num_nodes)
    width = -(-(point.prefix_len + point.num_nodes) // runner.page_size)
    tables = [request.pages.pages[:width] for request in engine.requests.values()]
    parents = tree_parents(point.num_nodes) * point.batch_size
    return plan_tree_attention(
        query_lens=[point.num_nodes] * point.batch_size,
        context_lens=[point.prefix_len] * point.batch_size,
        page_table=torch.tensor(tables, dtype=torch.int32, device=runner.device),
        parents=torch.tensor(parents, dtype=torch.int32, device=runner.device),
        page_size=runner.page_size,
        is_chain=[point.num_nodes == 1] * point.batch_size,
    )


def _products(runner: TargetRunner, x: torch.Tensor) -> None:
    """Every product of every layer, on rows of the right widths."""
    for layer in runner.model.layers:
        assert isinstance(layer, Qwen3Layer)
        attention, mlp = layer.attention, layer.mlp
        qkv = attention.qkv(x)
        attention.o.product(qkv[:, : attention.o.weight.shape[1]].contiguous())
        inner = mlp.gate_up(x)
        mlp.down.product(inner[:, : mlp.down.weight.shape[1]].contiguous())


def _others(runner: TargetRunner, point: Point) -> dict[str, Callable[[], object]]:
    """Attention of all layers over dense keys: with a dense mask, and by FlexAttention."""
    config, dtype, device = runner.model.config, runner.kv.dtype, runner.device
    num_keys = point.prefix_len + point.num_nodes
    kv_shape = (point.batch_size, config.num_kv_heads, num_keys, config.head_dim)
    dense_bytes = 2 * dtype.itemsize * point.batch_size * config.num_kv_heads * num_keys * config.head_dim
    if dense_bytes > _MOST_DENSE_BYTES:
        return {}
    k, v = (torch.randn(kv_shape, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(point.batch_size, config.num_heads, point.num_nodes, config.head_dim, dtype=dtype, device=device)
    sees = torch.ones(point.num_nodes, num_keys, dtype=torch.bool, device=device)
    for i, parent in enumerate(tree_parents(point.num_nodes)):
        own = sees[i, point.prefix_len :]
        own.zero_()
        if parent >= 0:
            own.copy_(sees[parent, point.prefix_len :])
        own[i] = True
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
    layers = range(config.num_layers)
    works: dict[str, Callable[[], object]] = {
        "attention by SDPA": lambda: [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True) for _ in layers
        ]
    }
    if device.type == "cuda":
        attend = _flex_attention(q, k, v, sees)
        works["attention by FlexAttention"] = lambda: [attend() for _ in layers]
    return works


def _flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        del b, h
        return sees[row, key]

    mask = create_block_mask(is_seen, None, None, q.shape[2], k.shape[2], device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)
