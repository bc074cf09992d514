"""The safetensors files of a checkpoint as their headers describe them. Reads no weight and loads no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Bits of an element by the names in headers.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
_LENGTH_BYTES, _MOST_HEADER_BYTES = 8, 100_000_000

#: Shapes by the names of tensors.
Shapes = dict[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for what is no JSON object."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the files that its index names.

    Raises:
        ValueError: a file is missing, or the index names what is no safetensors file of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            others = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
            hint = f"; {', '.join(others)} may hold code and is not read" if others else ""
            raise ValueError(f"{folder}: model.safetensors is missing{hint}")
        return [single]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: weight_map must give each tensor the name of its file")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name}: only .safetensors files beside it are read")
        if not (folder / name).exists():
            raise ValueError(f"{index}: names {name}, which is missing")
    return [folder / name for name in names]


def read_shapes(paths: Iterable[Path]) -> Shapes:
    """Shapes of all tensors of some files, each of which must be as long as its header says.

    Raises:
        ValueError: a file is cut short, is no safetensors file, contradicts itself, or has a tensor of another file.
    """
    found: Shapes = {}
    for path in paths:
        shapes = _read_header(path)
        for name in shapes.keys() & found.keys():
            raise ValueError(f"{path}: {name} is in another file too")
        found |= shapes
    return found


def check_sizes(num_layers: int, hidden_size: int, shapes: Shapes, folder: Path, *, prefix: str = "") -> None:
    """Compares what a configuration says with the weights before anything of its sizes is made.

    Args:
        num_layers: of the configuration.
        hidden_size: of the configuration.
        shapes: of all stored tensors.
        folder: of the checkpoint.
        prefix: before ``layers`` and ``norm`` in the tensors' names.

    Raises:
        ValueError: names the field, its value and what the weights have.
    """
    start = f"{prefix}layers."
    numbers = {name.removeprefix(start).partition(".")[0] for name in shapes if name.startswith(start)}
    stored_layers = sum(number.isdecimal() for number in numbers)
    norm = shapes.get(f"{prefix}norm.weight") or (hidden_size,)
    pairs = {"num_hidden_layers": (num_layers, stored_layers), "hidden_size": (hidden_size, norm[0])}
    for name, (given, stored) in pairs.items():
        if given != stored:
            raise ValueError(f"{folder / 'config.json'}: {name} = {given}: the weights have {stored}")


def _read_header(path: Path) -> Shapes:
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if num_bytes < _LENGTH_BYTES or length > min(_MOST_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
                raise ValueError(
                    f"{path}: is cut short or no safetensors file: {num_bytes} bytes with a header of {length}"
                )
            header = json.loads(file.read(length))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: is no safetensors file: the header is no JSON") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: is no safetensors file: the header is no JSON object")
    header.pop("__metadata__", None)
    shapes, end = {}, 0
    for name, about in header.items():
        shapes[name], last = _read_entry(path, name, about)
        end = max(end, last)
    announced = _LENGTH_BYTES + length + end
    if announced != num_bytes:
        what = "is cut short" if num_bytes < announced else "is longer than its header says"
        raise ValueError(f"{path}: {what}: {num_bytes} bytes of {announced}")
    return shapes


def _read_entry(path: Path, name: str, about: Any) -> tuple[tuple[int, ...], int]:
    """Shape of one tensor, and where its bytes end."""
    try:
        bits, shape, (first, last) = _BITS[about["dtype"]], tuple(about["shape"]), about["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
            raise ValueError
        if math.prod(shape) * bits != 8 * (last - first):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: the header contradicts itself about {name}: {str(about)[:120]}") from None
    return shape, last
