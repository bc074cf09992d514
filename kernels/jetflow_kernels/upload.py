"""Small tensors on their way to a device, without a wait for what the device is doing."""

from __future__ import annotations

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; queued there, by way of pinned memory. On a CPU the tensor itself."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
