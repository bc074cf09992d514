"""What a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from jetflow_kernels.machine import machine

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "ray", "grpcio")


def package_versions() -> dict[str, str | None]:
    """Installed versions, read without importing; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs, threads and versions, as plain JSON values. Imports torch."""
    import torch

    here = machine()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": here.processor,
        "num_cores": here.num_cores,
        "instructions": {"kernels": here.kernel_isa, "oneDNN": here.onednn_level, "torch": here.aten_level},
        "memory_bytes": here.memory_bytes,
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name, version in package_versions().items() if version is not None},
    }
