"""Small tensors that go to a device, or come from it, in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

#: Shape and dtype by name.
Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_ALIGNMENT = 16


class Staging:
    """Named tensors in one buffer on the device and one, pinned where the device is another, on the host.

    The views of both are made once and written in place, so that whoever holds them sees every later value.
    """

    def __init__(self, fields: Fields, device: torch.device):
        starts, size = {}, 0
        for name, (shape, dtype) in fields.items():
            starts[name] = size
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        #: Tensors on the host.
        self.host = {name: _view(self._host, starts[name], *field) for name, field in fields.items()}
        #: Tensors on the device.
        self.device = {name: _view(self._device, starts[name], *field) for name, field in fields.items()}

    @property
    def buffer(self) -> torch.Tensor:
        """All on the device, as uint8 ``[num_bytes]``."""
        return self._device

    @property
    def num_bytes(self) -> int:
        """On the device, and the same on the host."""
        return self._device.numel()

    def upload(self) -> None:
        """Queues the copy to the device; the host's tensors may be written again once it is done."""
        self._device.copy_(self._host, non_blocking=True)

    def begin_download(self) -> None:
        """Queues the copy from the device."""
        self._host.copy_(self._device, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device.device))

    def wait(self) -> None:
        """Until the last copy from the device, and so all that was queued before it, is done; what was queued behind it
        is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()


def _view(buffer: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return buffer[start : start + num_bytes].view(dtype).view(shape)
