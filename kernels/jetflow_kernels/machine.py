"""What this machine can do: processor, compiler, cores, memory. Asked here and nowhere else; needs no torch."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Instruction sets that the C kernels are compiled for, the widest first of each architecture.
ISAS = ("avx512", "avx2", "sse42", "neon", "scalar")
#: What a processor must list to have one, as ``/proc/cpuinfo`` names it; each includes those after it.
_NEEDS = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"}),
    "sse42": frozenset({"sse4_1", "sse4_2", "ssse3", "popcnt"}),
}
#: oneDNN's names for its own levels, narrowest first, as ``ONEDNN_MAX_CPU_ISA`` takes them.
_ONEDNN_LEVELS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
)
_COMMAND_LIMIT_S = 120.0
#: Mount points of control groups: version 2, and the controllers of version 1.
_GROUPS = Path("/sys/fs/cgroup")
#: By version: limit, use, and the line of ``memory.stat`` that counts caches.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A processor, and how much of the machine belongs to this process."""

    #: ``x86_64``, ``aarch64``, ...
    architecture: str
    #: Its name, for people.
    processor: str
    #: Features as the system lists them.
    features: frozenset[str]
    #: Processors that this process may use: its affinity, within the quota of its control group.
    num_cores: int
    #: Memory, within the limit of its control group.
    memory_bytes: int

    @property
    def isas(self) -> tuple[str, ...]:
        """Instruction sets of `ISAS` that this processor has, the widest first; never empty."""
        if self.architecture == "aarch64":
            return ("neon", "scalar")
        found, needed = [], frozenset[str]()
        for isa in ("sse42", "avx2", "avx512"):
            needed |= _NEEDS[isa]
            if self.architecture == "x86_64" and needed <= self.features:
                found.append(isa)
        return (*reversed(found), "scalar")

    @property
    def kernel_isa(self) -> str:
        """What the C kernels are compiled for: ``JETFLOW_CPU_ISA``, else the widest.

        Raises:
            ValueError: the variable names one that this processor does not have.
        """
        wanted = os.environ.get("JETFLOW_CPU_ISA")
        if not wanted:
            return self.isas[0]
        if wanted not in self.isas:
            raise ValueError(
                f"JETFLOW_CPU_ISA = {wanted!r}: this processor ({self.processor}) has {', '.join(self.isas)}"
            )
        return wanted

    @property
    def onednn_level(self) -> str:
        """The widest of oneDNN's levels that its products use here, ``ONEDNN_MAX_CPU_ISA`` respected; empty where
        it has none of x86's."""
        has = self.features.__contains__
        isas = self.isas
        found = {
            "SSE41": "sse42" in isas,
            "AVX": has("avx"),
            "AVX2": "avx2" in isas,
            "AVX512_CORE": "avx512" in isas,
            "AVX512_CORE_BF16": "avx512" in isas and has("avx512_bf16"),
            "AVX512_CORE_AMX": "avx512" in isas and has("amx_bf16"),
        }
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
        most = _ONEDNN_LEVELS.index(limit.upper()) if limit.upper() in _ONEDNN_LEVELS else len(_ONEDNN_LEVELS)
        levels = [name for name, is_there in found.items() if is_there and _ONEDNN_LEVELS.index(name) <= most]
        return levels[-1] if levels else ""

    @property
    def aten_level(self) -> str:
        """The vectors of torch's own operations, ``ATEN_CPU_CAPABILITY`` respected: avx512, avx2 or default."""
        limit = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
        levels = [isa for isa in ("avx512", "avx2") if isa in self.isas]
        if limit in ("avx512", "avx2", "default"):
            levels = levels[levels.index(limit) :] if limit in levels else [] if limit == "default" else levels
        return levels[0] if levels else "default"

    def computes_in(self, dtype: str) -> str:
        """The dtype of a processor's arithmetic for tensors asked for as `dtype`.

        Half types are computed in float32 wherever their own instructions are missing or would let a row's result
        depend on the other rows of its batch: oneDNN's AMX kernels do, its AVX512_BF16 ones do not.

        Args:
            dtype: float64, float32, bfloat16 or float16.
        """
        if dtype == "bfloat16" and self.onednn_level == "AVX512_CORE_BF16":
            return "bfloat16"
        return "float32" if dtype in ("bfloat16", "float16") else dtype

    def has_layouts(self, dtype: str) -> bool:
        """Whether oneDNN lays a weight of this dtype out for products whose rows do not depend on each other.
        Shown on x86-64 alone."""
        return bool(self.onednn_level) and dtype in ("float32", "bfloat16") and self.computes_in(dtype) == dtype


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What the bits of a result depend on besides weights and inputs. Replicas with equal ones give equal tokens."""

    #: Of the weights, and that they are computed with in: ``float32``, or ``bfloat16 in float32``.
    dtype: str
    #: A GPU's compute capability; empty is a CPU.
    gpu: str = ""
    #: Instruction sets on a CPU: of the compiled kernels (empty without), of oneDNN, of torch's own operations.
    kernels: str = ""
    onednn: str = ""
    aten: str = ""

    def __str__(self) -> str:
        if self.gpu:
            return f"{self.dtype} on {self.gpu}"
        return f"{self.dtype}, kernels {self.kernels or 'none'}, oneDNN {self.onednn or 'none'}, torch {self.aten}"

    def apply(self) -> None:
        """Has this process compute so, by its environment. Nothing may have computed in it yet.

        Raises:
            ValueError: its processor, or its environment so far, is narrower.
        """
        here = machine()
        narrower = here.isas[here.isas.index(here.kernel_isa) :]
        levels = (*ISAS[:2], "default")
        if self.gpu or not (
            (not self.kernels or self.kernels in narrower)
            and (not self.onednn or _level_index(self.onednn) <= _level_index(here.onednn_level))
            and levels.index(self.aten) >= levels.index(here.aten_level)
        ):
            own = f"kernels {here.kernel_isa}, oneDNN {here.onednn_level or 'none'}, torch {here.aten_level}"
            raise ValueError(f"{here.processor} has no more than {own}: it cannot compute in {self}")
        kernels = {"JETFLOW_CPU_ISA": self.kernels} if self.kernels else {"JETFLOW_CPU_KERNELS": "0"}
        onednn = {"ONEDNN_MAX_CPU_ISA": self.onednn} if self.onednn else {}
        os.environ.update(kernels | onednn | {"ATEN_CPU_CAPABILITY": self.aten})


def _level_index(level: str) -> int:
    return _ONEDNN_LEVELS.index(level) if level in _ONEDNN_LEVELS else -1


@cache
def machine() -> Machine:
    """This one. Files of the system are read by the first call; environment variables when they matter."""
    features, processor = _cpuinfo(Path("/proc/cpuinfo"))
    return Machine(
        architecture={"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()),
        processor=processor or platform.processor() or platform.machine(),
        features=features,
        num_cores=_num_cores(),
        memory_bytes=min(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            *(_memory_limit_bytes(group, version) for version in (1, 2) for group in own_groups("memory", version)),
        ),
    )


def _cpuinfo(path: Path) -> tuple[frozenset[str], str]:
    """Features and name; empty where the system does not list them."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset(), ""
    lines = [line.partition(":") for line in text.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return frozenset((fields.get("flags") or fields.get("Features") or "").split()), fields.get("model name", "")


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
            lines = run([*command, "--version"]).splitlines()
            return Compiler(command=command, version=lines[0] if lines else "")
    raise OSError("no C compiler: neither CC nor cc nor gcc is there")


def run(command: list[str]) -> str:
    """What a command prints. Raises OSError with its complaint where it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took more than {_COMMAND_LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).strip()[:500]
        raise OSError(f"{command[0]} failed with {done.returncode}: {complaint}")
    return done.stdout


def _num_cores() -> int:
    """Affinity, and whole processors of the tightest quota: threads beyond a quota are stopped in mid-step."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_cpu_quota(group) for version in (1, 2) for group in own_groups("cpu", version)]
    return max(1, min([cores, *(int(quota) for quota in quotas if quota is not None)]))


def _cpu_quota(group: Path) -> float | None:
    """Processors that a control group may use at once; None where it is not limited."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):
        return None


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, within the limits of this process's control groups."""
    return min(
        _host_memory_bytes(Path("/proc/meminfo")),
        *(memory_room_bytes(group, version) for version in (1, 2) for group in own_groups("memory", version)),
    )


def _host_memory_bytes(meminfo: Path) -> int:
    """What the kernel would give, caches that it can drop included."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def own_groups(
    controller: str, version: int, *, mount: Path = _GROUPS, listed: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """Folders of this process's control group and of all those above it, the own first.

    Args:
        controller: ``cpu`` or ``memory``.
        version: of the control groups, 1 or 2.
        mount: where the hierarchies, or the part of them that a container sees, are mounted.
        listed: the process's groups. Within a container its group may not be seen: then what is mounted is the
            container's own, and folders that are not there limit nothing.
    """
    try:
        entries = [line.split(":", 2) for line in listed.read_text().splitlines()]
    except OSError:
        entries = []
    groups = {name: entry[2] for entry in entries if len(entry) == 3 for name in entry[1].split(",")}
    root = mount if version == 2 else mount / controller
    folder = root / groups.get("" if version == 2 else controller, "/").lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _memory_limit_bytes(group: Path, version: int) -> int:
    try:
        return int((group / _MEMORY_FILES[version][0]).read_text())
    except (OSError, ValueError):
        return sys.maxsize


def memory_room_bytes(group: Path, version: int) -> int:
    """Room under a control group's limit, file caches that can be dropped included; the largest integer where
    nothing is limited."""
    limit_name, usage_name, cache_name = _MEMORY_FILES[version]
    try:
        limit, usage = (int((group / name).read_text()) for name in (limit_name, usage_name))
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - usage + int(fields[cache_name]))
    except (OSError, KeyError, ValueError):
        return sys.maxsize
