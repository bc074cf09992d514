"""What a configuration means on this machine: device, dtypes, lengths."""

from __future__ import annotations

import torch

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.parallel.tp_group import TpGroup


def compute_device(config: EngineConfig) -> torch.device:
    """``auto`` is CUDA where there is any.

    Raises:
        ValueError: there is no such device, or it is another GPU than the process's current one, on which kernels are
            launched.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ValueError(f"device = {config.device!r}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not 0 <= (device.index or 0) < count:
            raise ValueError(f"device = {config.device!r}: no such device; torch finds {count} CUDA devices here")
        if device.index is not None and device.index != (current := torch.cuda.current_device()):
            raise ValueError(
                f"device = {config.device!r}: this process launches on cuda:{current}; choose another GPU with "
                f"CUDA_VISIBLE_DEVICES={device.index} and device = 'cuda'"
            )
    return device


def compute_dtype(config: EngineConfig) -> torch.dtype | None:
    """Of the target; None is its checkpoint's."""
    found: torch.dtype | None = None if config.dtype == "auto" else getattr(torch, config.dtype)
    return found


def compute_draft_dtype(config: EngineConfig, target_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the draft head beside a target of this dtype."""
    if config.draft_dtype != "auto":
        found: torch.dtype = getattr(torch, config.draft_dtype)
        return found
    has_bf16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bf16 and target_dtype is torch.float32 else target_dtype


def max_model_len(config: EngineConfig, target: TargetConfig) -> int:
    """Longest prompt plus output.

    Raises:
        ValueError: more than the model can.
    """
    limit = target.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len = {config.max_model_len}: the model's limit is {limit}")
    return config.max_model_len or limit


def why_no_graphs(config: EngineConfig, device: torch.device, tp: TpGroup) -> str | None:
    """Why no step of an engine is replayed from a CUDA graph; None where steps are."""
    if device.type != "cuda":
        return f"device = {device.type}: only CUDA records graphs"
    if not config.cuda_graphs:
        return "cuda_graphs = False"
    if not tp.may_be_recorded:
        return f"tensor_parallel_size = {tp.size}: ranks that NCCL does not join meet on the host"
    return None
