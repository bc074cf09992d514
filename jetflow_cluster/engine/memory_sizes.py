"""The lines of a memory plan, from configurations and models without weights.

Activations are bounds: the largest set of tensors that are alive together in the code of `layers` and `models`, for
the largest step that the configuration allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from jetflow_cluster.cache.kv_cache import bytes_per_page, kv_dtype
from jetflow_cluster.config import DEFAULT_MAX_TREE_NODES, MAX_WIDTH, EngineConfig
from jetflow_cluster.engine.memory_plan import MemoryItem
from jetflow_cluster.engine.step_scratch import largest_bucket
from jetflow_cluster.layers.embedding import ParallelLmHead
from jetflow_cluster.layers.linear import Linear, QkvLinear, is_packable
from jetflow_cluster.models.config import TransformerConfig
from jetflow_cluster.models.draft_head import DraftFuser, DraftHead
from jetflow_cluster.models.registry import TargetModel
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.tree.coupled import POOL_SIZE
from jetflow_kernels.tree_attention.schedule import CALL_PRODUCTS, GATHER_BYTES


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest step."""

    #: Rows of all requests, each with logits at worst.
    num_rows: int
    num_requests: int
    #: Longest prompt plus output.
    max_len: int
    tp_size: int = 1

    @classmethod
    def of(cls, config: EngineConfig, max_model_len: int) -> StepLimits:
        """What a configuration allows."""
        return cls(
            num_rows=config.max_num_batched_tokens,
            num_requests=config.max_num_requests,
            max_len=max_model_len,
            tp_size=config.tensor_parallel_size,
        )


def page_bytes(model: TargetModel | DraftHead, page_size: int, device: torch.device) -> int:
    """Bytes of one page over all layers of a model, on this rank."""
    return bytes_per_page(
        num_layers=model.config.num_layers,
        page_size=page_size,
        num_kv_heads=model.num_local_kv_heads,
        head_dim=model.config.head_dim,
        dtype=kv_dtype(model.dtype, device),
    )


def weight_items(name: str, model: TargetEnds | DraftFuser, device: torch.device) -> list[MemoryItem]:
    """Weights, the two ends of a target by themselves, and the copies that CPUs compute with."""
    items, counted = [], 0
    if isinstance(model, TargetEnds):
        embedding = _bytes_of(model.embedding)
        head = 0 if model.config.tie_word_embeddings else _bytes_of(model.lm_head)
        counted = embedding + head
        items.append(
            MemoryItem(name="embedding", num_bytes=embedding, detail="also the output layer" if not head else "")
        )
        items.append(MemoryItem(name="lm_head", num_bytes=head))
    items.append(MemoryItem(name=name, num_bytes=_bytes_of(model) - counted, detail=f"weights, {_short(model.dtype)}"))
    packed = _packed_bytes(model, device)
    return [*items, MemoryItem(name=f"{name}, laid out for the CPU", num_bytes=packed, detail="oneDNN's copies")]


def sidecar_item(vocab_size: int, rank: int) -> MemoryItem:
    """The side-car's two factors; each rank holds all of them."""
    return MemoryItem(name="side-car", num_bytes=2 * vocab_size * rank * 4, detail=f"rank {rank}, fp32")


def tree_item(head: DraftHead, limits: StepLimits, max_nodes: int = DEFAULT_MAX_TREE_NODES) -> MemoryItem:
    """Candidate tables, trees and ancestor bits of the largest batch."""
    depth = head.config.block_size - 1
    tables = limits.num_requests * depth * MAX_WIDTH * (8 + 4 * MAX_WIDTH)
    trees = limits.num_rows * (4 * 8 + 4 * -(-max(max_nodes, 512) // 32))
    return MemoryItem(name="trees", num_bytes=tables + trees, detail="candidate tables, nodes, ancestor bits")


def activation_item(
    target: TargetModel, head: DraftHead | None, num_taps: int, limits: StepLimits, device: torch.device
) -> MemoryItem:
    """What one step computes with: drafting and verifying take turns, so the larger one counts."""
    passes = {"verify": _verify_bytes(target, num_taps, limits, device)}
    if head is not None:
        passes["draft"] = draft_bytes(head, target, limits, device)
    detail = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in passes.items())
    return MemoryItem(name="activations", num_bytes=max(passes.values()), detail=f"the larger of {detail}")


def graph_item(
    target: TargetModel, head: DraftHead | None, num_taps: int, limits: StepLimits, device: torch.device
) -> MemoryItem:
    """What recorded steps keep for themselves: one pool for what they compute with, and what they accept by."""
    pool = activation_item(target, head, num_taps, limits, device).num_bytes
    vocab_size = target.config.vocab_size
    # Best scores and tokens of 1024 tokens each, and rows of scores in fp64, twice.
    requests, rows = largest_bucket(limits.num_requests, limits.num_rows)
    walk = rows * -(-vocab_size // 1024) * 12 + requests * vocab_size * 16
    # Where log-probabilities are asked for.
    kept = (rows + requests) * vocab_size * target.dtype.itemsize
    detail = "the pool of recorded steps, their walks, and logits that are kept"
    return MemoryItem(name="graphs", num_bytes=pool + walk + kept, detail=detail)


def draft_activation_item(head: DraftHead, ends: TargetEnds, limits: StepLimits, device: torch.device) -> MemoryItem:
    """What a draft worker computes with."""
    size = draft_bytes(head, ends, limits, device)
    return MemoryItem(name="activations", num_bytes=size, detail="one pass of the head")


def draft_bytes(head: DraftHead, ends: TargetEnds, limits: StepLimits, device: torch.device) -> int:
    """One pass of the head over the blocks of all requests, and the tables made of its logits."""
    config = head.config
    num_rows = limits.num_requests * config.block_size
    layers = _layer_bytes(config, head, num_rows, limits, device)
    num_logits = limits.num_requests * (config.block_size - 1)
    wide = torch.promote_types(ends.dtype, torch.float32).itemsize
    # Logits, the same widened, sharpened and chosen from, which on a device are there together, and their log-softmax;
    # then the pools of those that sample.
    num_wide = 2 if device.type == "cpu" else 3
    logits = num_logits * config.vocab_size * (_logits_copies(limits) * ends.dtype.itemsize + num_wide * wide)
    pools = num_logits * min(POOL_SIZE, config.vocab_size) * 6 * 8
    hidden = num_rows * config.hidden_size * (head.dtype.itemsize + ends.dtype.itemsize)
    return max(layers, hidden + logits + pools)


def _verify_bytes(target: TargetModel, num_taps: int, limits: StepLimits, device: torch.device) -> int:
    config, num_rows, size = target.config, limits.num_rows, target.dtype.itemsize
    layers = _layer_bytes(config, target, num_rows, limits, device)
    # The tapped rows, and all of them side by side.
    taps = 2 * num_rows * num_taps * config.hidden_size * size
    # Logits of every row, and what log-probabilities or a search on the CPU make of them.
    wide = max(4, size)
    logits = num_rows * config.vocab_size * (_logits_copies(limits) * size + wide)
    return taps + max(layers, 2 * num_rows * config.hidden_size * size + logits)


def _logits_copies(limits: StepLimits) -> int:
    """Parts from other ranks are received and then joined."""
    return 1 if limits.tp_size == 1 else 2


def _layer_bytes(
    config: TransformerConfig,
    model: TargetModel | DraftHead,
    num_rows: int,
    limits: StepLimits,
    device: torch.device,
) -> int:
    """Most that one layer holds at a time, the residual stream included."""
    size, hidden = model.dtype.itemsize, config.hidden_size
    kv = model.num_local_kv_heads * config.head_dim
    q = config.num_heads // limits.tp_size * config.head_dim
    inner = config.intermediate_size // limits.tp_size
    # Norms compute in fp32: the widened rows, their square, and the result.
    norm = 3 * 4 if model.dtype.itemsize < 4 or device.type != "cpu" else 2 * 4
    rotary = 2 * config.head_dim
    attention = size * (2 * hidden + rotary + (q + 2 * kv) + 2 * (q + kv)) + norm * (q + kv)
    attend = size * (3 * hidden + rotary + (q + 2 * kv) + (q + kv) + 2 * q)
    mlp = size * (4 * hidden + rotary + 3 * inner)
    scratch = _attention_scratch(config, model, num_rows, limits, device)
    return max(num_rows * attention, num_rows * attend + scratch, num_rows * mlp)


def _attention_scratch(
    config: TransformerConfig,
    model: TargetModel | DraftHead,
    num_rows: int,
    limits: StepLimits,
    device: torch.device,
) -> int:
    """On a CPU masks, widened rows and gathered keys; elsewhere the parts of split keys."""
    kv_heads, head_dim = model.num_local_kv_heads, config.head_dim
    q_heads = config.num_heads // limits.tp_size
    if device.type != "cpu":
        # Splits are made only where few rows would leave the chip idle: `MAX_SPLITS` parts of at most so many rows.
        return 32 * min(num_rows, 512) * q_heads * (head_dim + 1) * 4
    wide = max(4, model.dtype.itemsize)
    # Each request that is padded into a call adds no more pairs of a row and a key than a call is worth.
    padding = (limits.num_requests - 1) * (CALL_PRODUCTS // (q_heads * head_dim))
    masks = (num_rows * limits.max_len + padding) * (q_heads // kv_heads) * wide
    # K and V of one call and of the one before it.
    one = limits.max_len * kv_heads * head_dim * wide
    gathered = 4 * max(one, min(one * limits.num_requests, GATHER_BYTES * torch.get_num_threads()))
    return masks + gathered + 3 * num_rows * q_heads * head_dim * wide


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _packed_bytes(model: nn.Module, device: torch.device) -> int:
    """A second copy of each weight that oneDNN multiplies by, and a third one of the K and V part in a draft head."""
    total = 0
    for module in model.modules():
        if isinstance(module, (Linear, ParallelLmHead)) and is_packable(module.weight, device):
            total += module.weight.numel() * module.weight.element_size()
            if isinstance(model, DraftHead) and isinstance(module, QkvLinear):
                rows = sum(module.local_sizes[1:])
                total += rows * module.weight.shape[1] * module.weight.element_size()
    return total


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
