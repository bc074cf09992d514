"""How much memory a device has to give."""

from __future__ import annotations

import torch

from jetflow_kernels import machine


def available_memory_bytes(device: torch.device) -> int:
    """Memory of the device that can be had without swapping; on a CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine.available_memory_bytes()
