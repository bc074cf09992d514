"""Keeps measured cost models in a folder, one file per device, model and number of shards."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import torch

from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.env import read_environment
from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.machine import machine

_log = logging.getLogger(__name__)
#: Of what is measured: models that were measured otherwise are not read.
_VERSION = 3


def device_name(device: torch.device) -> str:
    """What tells devices with other costs apart: a GPU's name, or the processor with the threads that torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{machine().processor} {torch.get_num_threads()} threads"


class CostStore:
    """One file.

    Args:
        device: of the target.
        described: what else costs depend on: configurations of target and head, compute types.
        tensor_parallel_size: shards of the target.
        folder: None is the cache folder of the environment.
    """

    def __init__(
        self, device: torch.device, described: object, *, tensor_parallel_size: int = 1, folder: Path | None = None
    ):
        name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()
        kernels = cpu_kernels().name if device.type == "cpu" else ""
        depends = f"{_VERSION} {torch.__version__} {kernels} {described!r}"
        digest = hashlib.sha256(depends.encode()).hexdigest()[:12]
        self.path = (
            folder or read_environment().cache_dir.expanduser() / "costs"
        ) / f"{name}-{digest}-tp{tensor_parallel_size}.json"

    def load(self) -> CostModel | None:
        """The stored model; None when there is none that can be read."""
        try:
            return CostModel.from_json(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s: %s; costs are measured anew", self.path, error)
            return None

    def save(self, model: CostModel) -> None:
        """Writes it whole or not at all. A folder that cannot be written to costs a measurement next time, no more."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(model.to_json())
            os.replace(name, self.path)
        except OSError as error:
            _log.warning("%s: %s; costs are not kept", self.path, error)
