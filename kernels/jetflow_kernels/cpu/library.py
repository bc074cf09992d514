"""The compiled functions, loaded on first use."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jetflow_kernels.cpu.compiler import build, is_whole, library_folder, library_name
from jetflow_kernels.folder_lock import held
from jetflow_kernels.machine import Compiler, find_compiler, machine

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
#: Seconds that another process may take to compile before this one does so too.
_OTHERS_LIMIT_S = 120.0

#: Whether a dtype is half as wide as fp32, as the functions ask for it; others are not served.
HALF = {torch.float32: 0, torch.bfloat16: 1}

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
#: Of each function what it takes and what it returns, as in the sources.
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "rms_norm": ([_POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _INT, _INT], None),
    "silu_mul": ([_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _INT, _INT], None),
    "qk_norm_rope_store": (
        [_POINTER, _SIZE, *[_POINTER] * 7, *[_SIZE] * 5, _FLOAT, _INT, _INT, _INT],
        ctypes.c_int,
    ),
    "tree_attention": (
        [_POINTER, _SIZE, *[_POINTER] * 7, *[_SIZE] * 9, _FLOAT, _INT, _INT],
        ctypes.c_int,
    ),
    "grow_trees": (
        [_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER],
        ctypes.c_int,
    ),
    "draft_candidates": (
        [_POINTER, _SIZE, _SIZE, _INT, *[_SIZE] * 4, _FLOAT, _POINTER, _POINTER, _SIZE, _INT, *[_POINTER] * 3, _INT],
        ctypes.c_int,
    ),
    "map_scores": ([_POINTER, _SIZE, _SIZE, _POINTER, *[_SIZE] * 4, _POINTER], None),
}


@dataclass(frozen=True, kw_only=True)
class Functions:
    """All of them, ready to be called in two ways."""

    #: With the interpreter's lock held: for what takes less time than another thread needs to take over.
    held: ctypes.CDLL
    #: With the lock released.
    released: ctypes.CDLL


@dataclass(frozen=True, kw_only=True)
class CpuKernels:
    """What this process has."""

    functions: Functions | None
    #: Who compiled them, or why there are none.
    detail: str
    #: Tells builds apart: of other sources, by another compiler, for another instruction set.
    name: str = ""
    #: The instruction set, one of `machine.ISAS`; empty where there are no functions.
    isa: str = ""


_found: CpuKernels | None = None


def cpu_kernels() -> CpuKernels:
    """The functions of this process; compiled and loaded by the first call. Raises nothing: where there is no
    compiler, or ``JETFLOW_CPU_KERNELS=0`` asks for it, there are no functions, and plain torch does the same work."""
    global _found
    if _found is None:
        with _LOCK:
            if _found is None:
                _found = load_cpu_kernels()
    return _found


def is_plain(x: torch.Tensor) -> bool:
    """False for what has no memory on this CPU, and for what autograd or a compiler is to follow."""
    return type(x) is torch.Tensor and x.is_cpu and not x.requires_grad and not torch.compiler.is_compiling()


def load_cpu_kernels() -> CpuKernels:
    """Compiles and loads them anew."""
    if os.environ.get("JETFLOW_CPU_KERNELS") == "0":
        return CpuKernels(functions=None, detail="off: JETFLOW_CPU_KERNELS=0")
    try:
        compiler = find_compiler()
        has_openmp = compiler.calls_gnu_openmp and _share_openmp()
        return _first_that_loads(compiler, has_openmp=has_openmp)
    except Exception as error:
        # Whatever is wrong with a compiler, a folder or a system must not stop what works without them.
        _LOG.warning("no compiled CPU kernels, plain torch instead: %s", error)
        return CpuKernels(functions=None, detail=f"none: {error}")


def _first_that_loads(compiler: Compiler, *, has_openmp: bool) -> CpuKernels:
    """The best that the compiler can make. Raises OSError with the last reason where it can make nothing."""
    isa = machine().kernel_isa
    reason: OSError | None = None
    for flags in [("-fopenmp",), ()] if has_openmp else [()]:
        try:
            functions = _load(compiler, isa, flags)
        except OSError as error:
            _LOG.debug("CPU kernels for %s with %s: %s", isa, " ".join(flags) or "no flags", error)
            reason = error
        else:
            threads = "threads" if flags else "one thread"
            return CpuKernels(
                functions=functions,
                detail=f"{isa}, compiled by {compiler.version}, {threads}",
                name=library_name(compiler, isa, flags),
                isa=isa,
            )
    assert reason is not None
    raise reason


def _load(compiler: Compiler, isa: str, flags: tuple[str, ...]) -> Functions:
    """What was compiled before, or else now. Raises OSError where that cannot be compiled or loaded."""
    with library_folder() as folder:
        path = folder / library_name(compiler, isa, flags)
        found = _kept(path)
        if found is None:
            # Processes that start together would else compile the same at the same time.
            with held(folder, _OTHERS_LIMIT_S):
                found = _kept(path)
                if found is None:
                    build(compiler, isa, flags, path)
                    found = _declared(path)
        return found


def _kept(path: Path) -> Functions | None:
    """What a file holds; None where it is not there, or damaged."""
    if is_whole(path):
        try:
            return _declared(path)
        except OSError as error:
            _LOG.debug("%s is compiled again: %s", path, error)
    return None


def _declared(path: Path) -> Functions:
    """Loads them and tells ctypes their types."""
    functions = Functions(held=ctypes.PyDLL(str(path)), released=ctypes.CDLL(str(path)))
    for library in (functions.held, functions.released):
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    return functions


def _share_openmp() -> bool:
    """Makes the GNU OpenMP that torch has loaded serve what is loaded from now on; false where it has loaded none."""
    bundled = Path(torch.__file__).parent
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
        # Other packages may bring one of their own.
        path = min(paths, key=lambda each: (bundled not in Path(each).parents, each))
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
    except (OSError, ValueError, AttributeError):
        return False
    return True
