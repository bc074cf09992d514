"""Where Triton kernels run."""

from __future__ import annotations

import os

import torch


def runs_triton(device: torch.device) -> bool:
    """True on GPUs, and everywhere under triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
