"""Builds the C sources with this machine's compiler and keeps what it built."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from jetflow_kernels.machine import Compiler, machine, run

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("rows.c", "attention.c", "candidates.c", "trees.c"))
_HEADER = Path(__file__).with_name("numbers.h")
#: Nothing that lets the compiler reassociate, fuse products with sums, or take NaN and infinity for impossible.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_DIGEST_BYTES = hashlib.sha256().digest_size
#: What makes the compiler use an instruction set; named one by one, since older compilers know no levels.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
_ISA_FLAGS = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    "avx2": _AVX2,
    "sse42": ("-msse4.2", "-mpopcnt"),
    "neon": (),
    "scalar": (),
}


def library_name(compiler: Compiler, isa: str, flags: tuple[str, ...]) -> str:
    """A file name for what is built of these sources, by this compiler, for this instruction set."""
    sources = [source.read_text(encoding="utf-8") for source in (_HEADER, *_SOURCES)]
    parts = (*sources, *compiler.command, compiler.version, *_FLAGS, machine().architecture, isa, *flags)
    return f"cpu-{isa}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def build(compiler: Compiler, isa: str, flags: tuple[str, ...], target: Path) -> None:
    """Compiles for one of `machine.ISAS` to `target`, in whose folder all is written; other processes may do so too.

    Raises:
        OSError: the compiler's reason, or the folder's.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = [Path(folder, f"{source.stem}.o") for source in _SOURCES], Path(folder, "cpu.so")
        commands = [
            [*compiler.command, *_FLAGS, *_ISA_FLAGS[isa], *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(_SOURCES, compiled, strict=True)
        ]
        with ThreadPoolExecutor(min(len(commands), machine().num_cores)) as threads:
            list(threads.map(run, commands))
        # Linked without -fopenmp: the library that torch has loaded is to serve, and no second one.
        run([*compiler.command, "-shared", *map(str, compiled), "-lm", "-o", str(linked)])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        linked.replace(target)


def is_whole(path: Path) -> bool:
    """True if the file is what `build` wrote: a loader may crash on one that was cut short."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


@contextmanager
def library_folder() -> Iterator[Path]:
    """``kernels`` in ``JETFLOW_CACHE_DIR``; one for this process alone where that cannot be written to."""
    try:
        folder = Path(os.environ.get("JETFLOW_CACHE_DIR") or "~/.cache/jetflow").expanduser() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix="jetflow-kernels-") as temporary:
            yield Path(temporary)
    else:
        yield folder
