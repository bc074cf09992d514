"""From a configuration to a memory plan: models are described, and nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from jetflow_cluster.cache.free_memory import available_memory_bytes
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.memory_plan import MemoryItem, MemoryPlan, fit_pages
from jetflow_cluster.engine.memory_sizes import (
    StepLimits,
    activation_item,
    draft_activation_item,
    graph_item,
    page_bytes,
    sidecar_item,
    tree_item,
    weight_items,
)
from jetflow_cluster.engine.resolve import (
    compute_device,
    compute_draft_dtype,
    compute_dtype,
    max_model_len,
    why_no_graphs,
)
from jetflow_cluster.models.draft_head import DraftFuser, DraftHead
from jetflow_cluster.models.hub import checkpoints
from jetflow_cluster.models.loader import load_draft_head, load_fuser, load_target, load_target_ends, sidecar_rank
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.parallel.tp_group import TpGroup

_META = torch.device("meta")


def plan_memory(config: EngineConfig, tp: TpGroup | None = None, *, with_head: bool = True) -> MemoryPlan:
    """What one rank of an engine will hold.

    Args:
        config: the engine's.
        tp: the ranks that share the model, all of which plan at the same time; None is this process alone.
        with_head: the draft head is on this rank too; otherwise the part of it that reads the target's taps is.

    Raises:
        ValueError: it does not fit, with a table of what would be held; or a checkpoint cannot be loaded.
        FileNotFoundError: a checkpoint is not there.
    """
    tp = tp or TpGroup.single()
    target_dir, head_dir = checkpoints(config)
    device = compute_device(config)
    target = load_target(target_dir, dtype=compute_dtype(config, device), device=_META, tp=tp)
    limits = StepLimits.of(config, max_model_len(config, target.config))
    items = weight_items("target", target, device)
    head: DraftHead | None = None
    num_taps = 0
    if head_dir is not None:
        draft_dtype = compute_draft_dtype(config, target.dtype, device)
        part: DraftFuser
        if with_head:
            part = head = load_draft_head(head_dir, target, dtype=draft_dtype, device=_META, tp=tp)
            items += [tree_item(head, limits), *_sidecar_items(head_dir, target)]
        else:
            part = load_fuser(head_dir, target, dtype=draft_dtype, device=_META)
        num_taps = len(part.config.target_layer_ids)
        items += weight_items("draft head", part, device)
    items.append(activation_item(target, head, num_taps, limits, device))
    # With a head elsewhere nothing is recorded.
    has_graphs = with_head and why_no_graphs(config, device, tp) is None
    if has_graphs:
        items.append(graph_item(target, head, num_taps, limits, device))
    plan = fit_pages(
        MemoryPlan(
            device=device,
            available_bytes=available_memory_bytes(device),
            items=tuple(items),
            target_page_bytes=page_bytes(target, config.page_size, device),
            draft_page_bytes=page_bytes(head, config.page_size, device) if head is not None else 0,
            num_scratch_pages=int(has_graphs),
        ),
        num_pages=config.num_pages,
        pages_per_request=-(-limits.max_len // config.page_size),
        max_num_requests=config.max_num_requests,
    )
    return replace(plan, num_pages=tp.smallest(plan.num_pages))


def plan_draft_worker(config: EngineConfig, num_pages: int) -> MemoryPlan:
    """What a dedicated draft worker will hold: the head, its own copy of the target's two ends, and draft context.

    Args:
        config: the target's engine's.
        num_pages: of the target's KV cache.

    Raises:
        ValueError: there is no draft head, or it does not fit into the memory, with a table.
        FileNotFoundError: a checkpoint is not there.
    """
    target_dir, head_dir = checkpoints(config)
    if head_dir is None:
        raise ValueError("draft_head = None: a draft worker needs a head")
    device = compute_device(config)
    ends = load_target_ends(target_dir, dtype=compute_dtype(config, device), device=_META)
    dtype = compute_draft_dtype(config, ends.dtype, device)
    head = load_draft_head(head_dir, ends.config, dtype=dtype, device=_META, tp=TpGroup.single())
    limits = replace(StepLimits.of(config, max_model_len(config, ends.config)), tp_size=1)
    items = [
        *weight_items("target", ends, device),
        *weight_items("draft head", head, device),
        *_sidecar_items(head_dir, ends),
        draft_activation_item(head, ends, limits, device),
    ]
    plan = MemoryPlan(
        device=device,
        available_bytes=available_memory_bytes(device),
        items=tuple(items),
        target_page_bytes=0,
        draft_page_bytes=page_bytes(head, config.page_size, device),
    )
    return fit_pages(plan, num_pages=num_pages, pages_per_request=1, max_num_requests=config.max_num_requests)


def _sidecar_items(head_dir: Path, target: TargetEnds) -> list[MemoryItem]:
    rank = sidecar_rank(head_dir)
    return [sidecar_item(target.config.vocab_size, rank)] if rank else []
