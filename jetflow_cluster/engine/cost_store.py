"""Keeps what warm-up measured: what steps cost, by device, model and number of shards, and what trees yield, by the
weights. Processes that start together measure once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.engine.draft_choice import Gains
from jetflow_cluster.env import read_environment
from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.folder_lock import held
from jetflow_kernels.machine import machine

_log = logging.getLogger(__name__)
#: Of what is measured: models that were measured otherwise are not read.
_VERSION = 3
#: Seconds that another process may measure before this one does so too.
_OTHERS_LIMIT_S = 300.0

_Measured = TypeVar("_Measured")


def device_name(device: torch.device) -> str:
    """What tells devices with other costs apart: a GPU's name, or the processor with the threads that torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{machine().processor} {torch.get_num_threads()} threads"


class CostStore:
    """Two files: costs depend on how large the models are, yields on their weights too.

    Args:
        device: of the target.
        described: what else costs depend on: configurations of target and head, compute types.
        weights: what yields depend on besides; None keeps none.
        tensor_parallel_size: shards of the target.
        folder: None is the cache folder of the environment.
    """

    def __init__(
        self,
        device: torch.device,
        described: object,
        *,
        weights: object = None,
        tensor_parallel_size: int = 1,
        folder: Path | None = None,
    ):
        name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()
        kernels = cpu_kernels().name if device.type == "cpu" else ""
        depends = f"{_VERSION} {torch.__version__} {kernels} {described!r}"
        folder = folder or read_environment().cache_dir.expanduser() / "costs"
        self.path = folder / f"{name}-{_digest(depends)}-tp{tensor_parallel_size}.json"
        self._gains_path: Path | None = None
        if weights is not None:
            self._gains_path = folder / f"gains-{_digest(f'{depends} {weights!r}')}.json"

    @property
    def is_filled(self) -> bool:
        """True where nothing is left to measure."""
        return self.load() is not None and (self._gains_path is None or self.load_gains() is not None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other process measures: both would measure each other, and the same besides."""
        self._make_folder()
        with held(self.path.parent, _OTHERS_LIMIT_S):
            yield

    def load(self) -> CostModel | None:
        """The stored model; None when there is none that can be read."""
        return _read(self.path, CostModel.from_json)

    def save(self, model: CostModel) -> None:
        """Writes it whole or not at all. A folder that cannot be written to costs a measurement next time, no more."""
        self._write(self.path, model.to_json())

    def load_gains(self) -> Gains | None:
        """The stored yields of these weights; None when there are none that can be read."""
        return _read(self._gains_path, lambda text: Gains.from_dict(json.loads(text))) if self._gains_path else None

    def save_gains(self, gains: Gains) -> None:
        """As `save` does."""
        if self._gains_path is not None:
            self._write(self._gains_path, json.dumps(gains.to_dict()))

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _log.debug("%s: %s", self.path.parent, error)

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except OSError as error:
            _log.warning("%s: %s; what was measured is not kept", path, error)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(path: Path, parse: Callable[[str], _Measured]) -> _Measured | None:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s: %s; it is measured again", path, error)
        return None
