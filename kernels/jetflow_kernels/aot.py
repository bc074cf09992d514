"""Compiles every kernel in every configuration that is shipped, for chips that need not be there.

``python -m jetflow_kernels.aot`` prints the table.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetflow_kernels.machine import machine

#: Compute capabilities that are compiled for, with the bytes of shared memory that one block may use.
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: Ops that have a kernel.
OPS = ("tree_attention", "qk_norm_rope_store", "commit_kv", "build_tree", "philox_gumbel", "accept_tree")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfiguration:
    """One specialization of a Triton kernel, as a launch would ask for it."""

    #: Unique, with what distinguishes it: ``tree_attention-bf16-d128-m64-split``.
    name: str
    #: The function under `triton.jit`.
    kernel: Any
    #: Type of each argument that is not a constant: ``*bf16``, ``*i32``, ``i64``, ``fp32``.
    types: Mapping[str, str]
    #: Value of each `tl.constexpr` argument.
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    #: Arguments that are multiples of 16 in every launch, as aligned pointers and strides are; None is every pointer.
    multiples_of_16: frozenset[str] | None = None
    #: Registers per thread that the assembler may use; None lets it trade them for occupancy, even by spilling.
    max_registers: int | None = None
    #: Registers may spill: head sizes above 128.
    may_spill: bool = False
    #: A product and a sum may become one operation, rounded once.
    fuses_products: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What the compiler made of one configuration."""

    name: str
    capability: int
    num_registers: int
    spill_bytes: int
    shared_memory_bytes: int
    may_spill: bool

    @property
    def fault(self) -> str | None:
        """Why it must not ship, or None."""
        where = f"{self.name} for sm_{self.capability}"
        if self.spill_bytes and not self.may_spill:
            return f"{where}: {self.spill_bytes} bytes of registers spill"
        limit = SHARED_MEMORY_BYTES[self.capability]
        if self.shared_memory_bytes > limit:
            return f"{where}: {self.shared_memory_bytes} bytes of shared memory, {limit} are there"
        return None


def shipped_configurations() -> list[KernelConfiguration]:
    """Of all ops. Imports triton."""
    found: list[KernelConfiguration] = []
    for op in OPS:
        found += importlib.import_module(f"jetflow_kernels.{op}.kernel").shipped_configurations()
    return found


def compile_ahead(configuration: KernelConfiguration, capability: int) -> Compiled:
    """Compiles one configuration down to machine code. The process must not have ``TRITON_INTERPRET`` set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = configuration.kernel.arg_names
    types = dict(configuration.types) | dict.fromkeys(configuration.constants, "constexpr")
    aligned = configuration.multiples_of_16
    if aligned is None:
        # torch aligns memory to 16 bytes and more.
        aligned = frozenset(name for name in names if str(types[name]).startswith("*"))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)}
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: types[name] for name in names},
        constexprs=dict(configuration.constants),
        attrs=attributes,
    )
    options: dict[str, object] = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    options["enable_fp_fusion"] = configuration.fuses_products
    if configuration.max_registers is not None:
        options["maxnreg"] = configuration.max_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    num_registers, spill_bytes = _resources(compiled.asm["cubin"])
    return Compiled(
        name=configuration.name,
        capability=capability,
        num_registers=num_registers,
        spill_bytes=spill_bytes,
        shared_memory_bytes=int(compiled.metadata.shared),
        may_spill=configuration.may_spill,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, which these kernels use for registers that spill alone."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"no registers are told: {told}")
    return int(found[1]), int(found[2])


def _compile_nth(job: tuple[int, int]) -> Compiled:
    index, capability = job
    return compile_ahead(shipped_configurations()[index], capability)


def compile_all(capabilities: tuple[int, ...] = tuple(SHARED_MEMORY_BYTES)) -> Iterator[Compiled]:
    """Every configuration for every chip, in a process per core, without the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    # Set either way, newer versions of triton do not warn that the default will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    num = len(shipped_configurations())
    jobs = [(index, capability) for index in range(num) for capability in capabilities]
    with ProcessPoolExecutor(machine().num_cores) as pool:
        yield from pool.map(_compile_nth, jobs)


def main() -> None:
    """Prints a line for each, and ends with 1 when one must not ship."""
    faults = 0
    for found in compile_all():
        faults += found.fault is not None
        print(
            f"{found.name:56} sm_{found.capability:<4} {found.num_registers:4} registers {found.spill_bytes:6} spilled "
            f"{found.shared_memory_bytes:7} shared {'' if found.fault is None else 'FAULT'}",
            flush=True,
        )
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
