"""Where the Triton kernels run: on a GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """``cuda`` or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
