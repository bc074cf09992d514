"""Calls of the compiled CPU kernels, recorded with their answers, to be made again by another build of them.

`recording` puts a recorder where `jetflow_kernels.cpu` looks for functions, so that what is recorded is what it passes.
tests/kernels/processors/calls.c makes the calls again.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from jetflow_kernels.cpu import library

_NAME_BYTES = 24
_TABLE_FIELDS = 8


class Kind(IntEnum):
    """Of an argument, as in calls.c."""

    INTEGER = 0
    FLOAT = 1
    INPUT = 2
    OUTPUT = 3
    NONE = 4
    TABLES = 5


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of a call's output that are to be those of another call, in which the same rows had other company."""

    #: Index of the other call.
    whole: int
    output: int
    own: slice
    of: slice


@dataclass(kw_only=True)
class Call:
    """One call. Outputs are in the order of the arguments."""

    function: str
    arguments: list[tuple[Kind, bytes]]
    dtypes: list[torch.dtype]
    #: What the recording library gave: the return value and the outputs.
    returned: int = 0
    answers: list[bytes] = field(default_factory=list)
    #: What a test says of it: a name, values by plain torch for some of the outputs with their tolerances, parts.
    name: str = ""
    wanted: dict[int, tuple[torch.Tensor, float, float]] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)


def _floats(half: int) -> torch.dtype:
    return torch.bfloat16 if half else torch.float32


#: Of each function: bytes at each pointer, and dtypes of the outputs, by position, from its arguments.
_Layout = tuple[dict[int, int], dict[int, torch.dtype]]


def _rms_norm(*a: Any) -> _Layout:
    size = 4 >> a[7]
    return {0: ((a[4] - 1) * a[1] + a[5]) * size, 2: a[5] * size, 3: a[4] * a[5] * size}, {3: _floats(a[7])}


def _silu_mul(*a: Any) -> _Layout:
    size = 4 >> a[5]
    return {0: ((a[3] - 1) * a[1] + 2 * a[4]) * size, 2: a[3] * a[4] * size}, {2: _floats(a[5])}


def _qk_norm_rope_store(*a: Any) -> _Layout:
    size, num_rows, num_heads, num_kv_heads, dim = 4 >> a[15], a[9], a[11], a[12], a[13]
    angles, pages = num_rows * dim * size, a[10] * num_kv_heads * dim * (4 >> a[16])
    sizes = {
        0: ((num_rows - 1) * a[1] + (num_heads + 2 * num_kv_heads) * dim) * size,
        2: (num_heads + num_kv_heads) * dim * size,
        3: angles,
        4: angles,
        5: num_rows * 8,
        6: num_rows * num_heads * dim * size,
        7: pages,
        8: pages,
    }
    return sizes, {6: _floats(a[15]), 7: _floats(a[16]), 8: _floats(a[16])}


def _tree_attention(*a: Any) -> _Layout:
    size, num_requests, row_size = 4 >> a[19], a[9], a[14] * a[16]
    requests = struct.unpack(f"<{4 * num_requests}q", ctypes.string_at(a[4], 32 * num_requests))
    num_rows = max(first + count for first, count in zip(requests[::4], requests[1::4], strict=True))
    pages = a[11] * a[12] * a[15] * a[16] * 4
    sizes = {
        0: ((num_rows - 1) * a[1] + row_size) * size,
        2: pages,
        3: pages,
        4: 32 * num_requests,
        5: 8 * (num_requests + 1),
        6: 4 * num_requests * a[10],
        7: 4 * num_rows * a[13],
        8: num_rows * row_size * size,
    }
    return sizes, {8: _floats(a[19])}


def _grow_trees(*a: Any) -> _Layout:
    sizes = {3: 8 * a[4], 5: 8 * a[6], 7: 32 * a[1] * a[8], 9: 8 * a[1]}
    return sizes, {7: torch.int64, 9: torch.int64}


def _draft_candidates(*a: Any) -> _Layout:
    size, (num_requests, num_depths, vocab_size, width) = 4 >> a[3], a[4:8]
    num = num_requests * num_depths * width
    factors = vocab_size * a[11] * (4 >> a[12])
    sizes = {
        0: ((num_requests - 1) * a[1] + (num_depths - 1) * a[2] + vocab_size) * size,
        9: factors,
        10: factors,
        13: 8 * num,
        14: 4 * num,
        15: 4 * num * (width if a[9] else 1),
    }
    return sizes, {13: torch.int64, 14: torch.float32, 15: torch.int32}


def _map_scores(*a: Any) -> _Layout:
    return {0: 4 * a[1] * a[2], 3: 4 * a[4] * a[5], 8: 4 * a[1] * a[2]}, {8: torch.int32}


_LAYOUTS: dict[str, Callable[..., _Layout]] = {
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
    "qk_norm_rope_store": _qk_norm_rope_store,
    "tree_attention": _tree_attention,
    "grow_trees": _grow_trees,
    "draft_candidates": _draft_candidates,
    "map_scores": _map_scores,
}


def _bytes_at(pointer: Any, size: int) -> bytes:
    return ctypes.string_at(pointer, size)


def _tables(pointer: Any, num: int) -> bytes:
    """Tables of `grow_trees`, and after them what they point at; pointers become distances from the first."""
    fields = list(struct.unpack(f"<{num * _TABLE_FIELDS}q", _bytes_at(pointer, 8 * num * _TABLE_FIELDS)))
    pointed = b""
    for i in range(0, len(fields), _TABLE_FIELDS):
        ids, scores, num_depths, num_parents, width = fields[i : i + 5]
        if not scores:
            continue
        fields[i] = 8 * len(fields) + len(pointed)
        pointed += _bytes_at(ids, 8 * num_depths * width)
        fields[i + 1] = 8 * len(fields) + len(pointed)
        pointed += _bytes_at(scores, 4 * num_depths * num_parents * width)
        pointed += bytes(-len(pointed) % 8)
    return struct.pack(f"<{len(fields)}q", *fields) + pointed


class _Recorder:
    """Stands where `library.Functions` has a library; attributes are its functions."""

    def __init__(self, functions: Any, calls: list[Call]) -> None:
        self._functions = functions
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._record, name)

    def _record(self, function: str, *arguments: Any) -> Any:
        sizes, outputs = _LAYOUTS[function](*arguments)
        recorded: list[tuple[Kind, bytes]] = []
        for i, value in enumerate(arguments):
            if value is None:
                recorded.append((Kind.NONE, b""))
            elif function == "grow_trees" and i == 0:
                recorded.append((Kind.TABLES, _tables(value, arguments[1])))
            elif i in sizes:
                recorded.append((Kind.OUTPUT if i in outputs else Kind.INPUT, _bytes_at(value, sizes[i])))
            elif isinstance(value, float):
                recorded.append((Kind.FLOAT, struct.pack("<d", value)))
            else:
                recorded.append((Kind.INTEGER, struct.pack("<q", value)))
        returned = getattr(self._functions, function)(*arguments)
        answers = [_bytes_at(arguments[i], sizes[i]) for i in outputs]
        call = Call(function=function, arguments=recorded, dtypes=list(outputs.values()))
        self._calls.append(replace(call, returned=returned or 0, answers=answers))
        return returned


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Every call of a compiled function goes into the list that this gives."""
    found = library.cpu_kernels()
    assert found.functions is not None, found.detail
    calls: list[Call] = []
    recorder: Any = _Recorder(found.functions.held, calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_found", replace(found, functions=library.Functions(held=recorder, released=recorder)))
        yield calls


def write_calls(calls: list[Call], path: Path) -> None:
    """As calls.c reads them."""
    parts = [struct.pack("<q", len(calls))]
    for call in calls:
        parts += [call.function.encode().ljust(_NAME_BYTES, b"\0"), struct.pack("<q", len(call.arguments))]
        for kind, content in call.arguments:
            parts += [struct.pack("<qq", kind, len(content)), content]
    path.write_bytes(b"".join(parts))


def read_answers(calls: list[Call], path: Path) -> list[Call]:
    """The calls with what calls.c has written for them."""
    content, place, made = path.read_bytes(), 0, []
    for call in calls:
        (returned,) = struct.unpack_from("<q", content, place)
        place += 8
        answers = []
        for size in (len(content) for kind, content in call.arguments if kind is Kind.OUTPUT):
            answers.append(content[place : place + size])
            place += size
        made.append(replace(call, returned=returned, answers=answers))
    assert place == len(content)
    return made


def output(call: Call, i: int) -> torch.Tensor:
    """Flat."""
    content = bytearray(call.answers[i])
    return torch.frombuffer(content, dtype=call.dtypes[i]) if content else torch.empty(0, dtype=call.dtypes[i])


def num_other(one: torch.Tensor, other: torch.Tensor) -> int:
    """Elements whose bits differ; which NaN it is that a processor makes is its own affair."""
    if not one.is_floating_point():
        return int((one != other).sum())
    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return int(((one.view(whole) != other.view(whole)) & ~(one.isnan() & other.isnan())).sum())
