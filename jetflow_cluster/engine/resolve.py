"""What a configuration means on this machine: device, dtypes, lengths."""

from __future__ import annotations

import torch

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.machine import machine

BF16 = "bfloat16"
HALF_DTYPES = (BF16, "float16")


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


def compute_dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """Of the target's arithmetic; None is its checkpoint's dtype. On a CPU ``auto`` is float32, where a row's result
    does not depend on its batch on any processor."""
    name = config.dtype
    if device.type == "cpu":
        name = "float32" if name == "auto" else _on_cpu(name)
    return None if name == "auto" else _dtype(name)


def weights_dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """What the target's weights are rounded to before they are computed with in another dtype; None is nothing."""
    if config.dtype == "auto" or _dtype(config.dtype) is compute_dtype(config, device):
        return None
    return _dtype(config.dtype)


def compute_draft_dtype(config: EngineConfig, target_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the draft head of a target with this dtype. Drafts may be computed in any: a draft is never a token."""
    name = config.draft_dtype
    if name == "auto":
        is_bf16 = device.type == "cpu" and target_dtype is torch.float32 and _on_cpu(BF16) == BF16
        return torch.bfloat16 if is_bf16 else target_dtype
    return _dtype(_on_cpu(name) if device.type == "cpu" else name)


def describe_dtype(config: EngineConfig, device: torch.device) -> str:
    """One sentence: in which dtype the target is computed, and why."""
    said = f"dtype = {config.dtype}"
    dtype = compute_dtype(config, device)
    if dtype is None:
        return f"{said}: the checkpoint's own, on {device}"
    name = str(dtype).removeprefix("torch.")
    if config.dtype == "auto":
        return f"{said}: {name}, as on every CPU: no token depends on the batch or on the tree that it is computed in"
    if device.type == "cpu" and name != config.dtype:
        return (
            f"{said}: weights are rounded to it and computed with in {name}: here ({machine().processor}, CPU kernels "
            f"{cpu_kernels().isa or 'none'}) a token would depend on its batch in {config.dtype}"
        )
    if name in HALF_DTYPES:
        return f"{said}: products have fewer digits than float32's, so where two tokens nearly tie another may win"
    return f"{said}: as asked for"


def _on_cpu(name: str) -> str:
    """The dtype that a CPU computes in for `name`: attention by plain torch is no less exact in bfloat16 than the
    compiled one, but depends on the tree, and rounding makes that seen."""
    computed = machine().computes_in(name)
    return "float32" if computed == BF16 and cpu_kernels().functions is None else computed


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


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
