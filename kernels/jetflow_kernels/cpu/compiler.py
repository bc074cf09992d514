"""Builds the C sources with this machine's compiler and keeps what it built."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("rows.c", "attention.c", "candidates.c", "trees.c"))
_HEADER = Path(__file__).with_name("numbers.h")
#: Nothing that lets the compiler reassociate, fuse products with sums, or take NaN and infinity for impossible.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_LIMIT_S = 120.0
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C compiler that answers."""

    command: tuple[str, ...]
    #: The first line of its ``--version``.
    version: str

    @property
    def calls_gnu_openmp(self) -> bool:
        """True where ``-fopenmp`` makes calls to GNU's library; clang's are to its own."""
        return "clang" not in self.version


def find_compiler() -> Compiler:
    """``CC`` of the environment, else ``cc``, else ``gcc``.

    Raises:
        OSError: none of them is there, or the one found does not answer.
    """
    for words in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"]):
        if words and (path := shutil.which(words[0])):
            command = (path, *words[1:])
            lines = _run([*command, "--version"]).splitlines()
            return Compiler(command=command, version=lines[0] if lines else "")
    raise OSError("no C compiler: neither CC nor cc nor gcc is there")


def library_name(compiler: Compiler, flags: tuple[str, ...]) -> str:
    """A file name for what is built of these sources, by this compiler, for this processor: homes may be shared."""
    sources = [source.read_text(encoding="utf-8") for source in (_HEADER, *_SOURCES)]
    parts = (*sources, *compiler.command, compiler.version, *_FLAGS, *flags, _processor())
    return f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def build(compiler: Compiler, flags: tuple[str, ...], target: Path) -> None:
    """Compiles to `target`, in whose folder all is written; other processes may do the same at once.

    Raises:
        OSError: the compiler's reason, or the folder's.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = [Path(folder, f"{source.stem}.o") for source in _SOURCES], Path(folder, "cpu.so")
        commands = [
            [*compiler.command, *_FLAGS, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(_SOURCES, compiled, strict=True)
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as threads:
            list(threads.map(_run, commands))
        # Linked without -fopenmp: the library that torch has loaded is to serve, and no second one.
        _run([*compiler.command, "-shared", *map(str, compiled), "-lm", "-o", str(linked)])
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


def _run(command: list[str]) -> str:
    """What a command prints. Raises OSError with its complaint where it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took more than {_COMPILE_LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).strip()[:500]
        raise OSError(f"{command[0]} failed with {done.returncode}: {complaint}")
    return done.stdout


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    known = {line for line in lines if line.startswith(("flags", "Features", "isa", "model name", "CPU part"))}
    return "\n".join([platform.machine(), *(sorted(known) or [platform.processor(), platform.node()])])
