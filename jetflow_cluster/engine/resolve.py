"""What a configuration means on this machine: folders, device, dtypes, lengths."""

from __future__ import annotations

from pathlib import Path

import torch

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.loader import resolve_checkpoint
from jetflow_cluster.parallel.tp_group import TpGroup

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default"


def checkpoints(config: EngineConfig) -> tuple[Path, Path | None]:
    """Folders of target and draft head; what is no folder is fetched.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    if config.model is not None:
        head = resolve_checkpoint(config.draft_head) if config.draft_head is not None else None
        return resolve_checkpoint(config.model), head
    target = DEFAULT_CHECKPOINT / "target"
    if not target.is_dir():
        raise FileNotFoundError(f"model = None: the embedded default is not installed at {target}")
    head = resolve_checkpoint(config.draft_head) if config.draft_head else DEFAULT_CHECKPOINT / "draft_head"
    return target, head


def compute_device(config: EngineConfig) -> torch.device:
    """``auto`` is CUDA where there is any.

    Raises:
        ValueError: another GPU than the process's current one, on which kernels are launched.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and device.index is not None and torch.cuda.is_available():
        current = torch.cuda.current_device()
        if device.index != current:
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
