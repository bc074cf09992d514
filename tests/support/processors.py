"""Builds of the CPU kernels for this processor and for others, run there or by QEMU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jetflow_kernels.cpu.compiler import compile_sources
from jetflow_kernels.machine import Compiler, find_compiler, machine, run

_PROGRAM = Path(__file__).parents[1] / "kernels" / "processors" / "calls.c"
_CROSS = "aarch64-linux-gnu-"
#: Debian's package of each command.
_PACKAGES = {
    "qemu-x86_64": "qemu-user",
    "qemu-aarch64": "qemu-user",
    f"{_CROSS}gcc": "gcc-aarch64-linux-gnu",
    f"{_CROSS}objdump": "binutils-aarch64-linux-gnu",
}
_RUN_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What a build runs on."""

    isa: str
    #: Command of an emulator; empty is this machine.
    emulator: tuple[str, ...] = ()
    #: Bytes after each buffer that the emulator reads by mistake.
    spare_bytes: int = 0

    def __str__(self) -> str:
        return "-".join((self.isa, *self.emulator[::2]))

    @property
    def is_fused(self) -> bool:
        """True where a product is fused with a sum: two orders of rounding, one for each of two kinds."""
        return self.isa in ("avx512", "avx2", "neon") or machine().architecture == "aarch64"


@dataclass(frozen=True, kw_only=True)
class Build:
    """The kernels for one instruction set."""

    objects: list[Path]
    #: Makes recorded calls.
    program: Path

    def make_calls(self, processor: Processor, calls: Path, answers: Path) -> subprocess.CompletedProcess[str]:
        """On a processor; a return code below 0 is the signal that ended it."""
        return subprocess.run(
            [*processor.emulator, str(self.program), str(calls), str(answers), str(processor.spare_bytes)],
            capture_output=True,
            text=True,
            timeout=_RUN_LIMIT_S,
            check=False,
        )

    def instructions(self, isa: str) -> dict[str, list[str]]:
        """Of each function, as objdump writes them."""
        objdump = f"{_CROSS}objdump" if _is_cross(isa) else "objdump"
        found: dict[str, list[str]] = {}
        for line in run([objdump, "-d", "--no-show-raw-insn", *map(str, self.objects)]).splitlines():
            if line.endswith(">:"):
                body = found.setdefault(line.split("<")[1].rstrip(">:").split(".")[0], [])
            elif line.startswith(" ") and ":" in line:
                body.append(line.split(":", 1)[1].strip())
        return found


def missing_packages() -> str:
    """One sentence; empty where all that other processors need is there."""
    missing = {package for command, package in _PACKAGES.items() if shutil.which(command) is None}
    compiler = shutil.which(f"{_CROSS}gcc")
    # A file that the compiler does not find is answered with its bare name.
    if compiler is None or run([compiler, "-print-file-name=libc.a"]).strip() == "libc.a":
        missing.add("libc6-dev-arm64-cross")
    return f"These Debian packages are missing: {', '.join(sorted(missing))}." if missing else ""


def _is_cross(isa: str) -> bool:
    return isa == "neon" and machine().architecture != "aarch64"


@cache
def cross_compiler() -> Compiler:
    """For aarch64."""
    command = f"{_CROSS}gcc"
    return Compiler(command=(command,), version=run([command, "--version"]).splitlines()[0])


def build_all(isas: list[str], folder: Path) -> dict[str, Build]:
    """As many at once as there are cores. What is built for another architecture brings its own C library.

    Raises:
        OSError: a compiler's reason.
    """

    def build(isa: str) -> Build:
        compiler = cross_compiler() if _is_cross(isa) else find_compiler()
        own = folder / isa
        own.mkdir()
        objects = compile_sources(compiler, isa, (), own)
        flags = ["-static"] if _is_cross(isa) else []
        run([*compiler.command, "-O1", *flags, str(_PROGRAM), *map(str, objects), "-lm", "-o", str(own / "calls")])
        return Build(objects=objects, program=own / "calls")

    with ThreadPoolExecutor(machine().num_cores) as pool:
        return dict(zip(isas, pool.map(build, isas), strict=True))


if __name__ == "__main__":
    sys.exit(missing_packages() or None)
