"""Tensors in safetensors files, by name. Nothing else is read: pickles may hold code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jetflow_cluster.models.stored_files import Shapes, read_shapes, weight_files

_MAX_PROBLEMS = 8
#: Parts of a file that `weights_digest` reads, from its first to its last byte, and bytes of each.
_NUM_SAMPLES, _SAMPLE_BYTES = 9, 65_536


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of some files, read when asked for. A context manager: the files are open within it."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        #: Full shape of each tensor.
        self.shapes: Shapes = {}

    @classmethod
    def of_checkpoint(cls, folder: Path) -> StoredTensors:
        """Of its `weight_files`; raises what they do."""
        return cls(weight_files(folder))

    def __enter__(self) -> StoredTensors:
        self.shapes = read_shapes(self._paths)
        for path in self._paths:
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._files.close()
                raise ValueError(f"{path}: {error}") from None
            self._where |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of one tensor; the rest is not read."""
        tensor: torch.Tensor = self._where[name].get_slice(name)[slices]
        return tensor

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        stored = self._where[name].get_slice(name)
        return self.read(name, tuple(slice(0, 1) for _ in stored.get_shape())).dtype


def weights_digest(*folders: Path) -> str:
    """Tells checkpoints apart whose configurations are equal: a digest of names, sizes and some of the content of their
    safetensors files. Reading all of it may take minutes."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * part // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: names what is missing, unexpected or misshapen; the first few of many.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        raise ValueError(f"{where}: {'; '.join(problems[:_MAX_PROBLEMS])}" + (f"; and {more} more" if more > 0 else ""))
