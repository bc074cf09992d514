"""What is read of a machine, and what follows from it: instruction sets, dtypes, cores, memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jetflow_cluster.cache.free_memory import available_memory_bytes
from jetflow_kernels import machine as module
from jetflow_kernels.machine import ISAS, Machine, machine, memory_room_bytes, own_groups

MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
SSE = "sse sse2 ssse3 sse4_1 sse4_2 popcnt"
AVX2 = f"{SSE} avx avx2 fma f16c bmi1 bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"
#: Features by processor.
PROCESSORS = {
    "nehalem": SSE,
    "zen 3": AVX2,
    "skylake-x": AVX512,
    "zen 4": f"{AVX512} avx512_bf16",
    "sapphire rapids": f"{AVX512} avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8",
    "neoverse": "fp asimd bf16",
    "unknown": "",
}


def machine_of(name: str) -> Machine:
    architecture = "aarch64" if name == "neoverse" else "x86_64"
    features = frozenset(PROCESSORS[name].split())
    return Machine(architecture=architecture, processor=name, features=features, num_cores=2, memory_bytes=2**34)


@pytest.fixture(autouse=True)
def no_restrictions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JETFLOW_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "isas", "onednn", "aten", "bf16"),
    [
        ("nehalem", ("sse42", "scalar"), "SSE41", "default", "float32"),
        ("zen 3", ("avx2", "sse42", "scalar"), "AVX2", "avx2", "float32"),
        ("skylake-x", ("avx512", "avx2", "sse42", "scalar"), "AVX512_CORE", "avx512", "float32"),
        ("zen 4", ("avx512", "avx2", "sse42", "scalar"), "AVX512_CORE_BF16", "avx512", "bfloat16"),
        # AMX adds up a row in another order when other rows come with it.
        ("sapphire rapids", ("avx512", "avx2", "sse42", "scalar"), "AVX512_CORE_AMX", "avx512", "float32"),
        ("neoverse", ("neon", "scalar"), "", "default", "float32"),
        ("unknown", ("scalar",), "", "default", "float32"),
    ],
)
def test_what_a_processor_can_do(name: str, isas: tuple[str, ...], onednn: str, aten: str, bf16: str) -> None:
    found = machine_of(name)
    assert (found.isas, found.kernel_isa) == (isas, isas[0])
    assert (found.onednn_level, found.aten_level) == (onednn, aten)
    assert {d: found.computes_in(d) for d in ("float64", "float32", "bfloat16", "float16")} == {
        "float64": "float64",
        "float32": "float32",
        "bfloat16": bf16,
        "float16": "float32",
    }
    assert found.has_layouts("float32") == bool(onednn)
    assert found.has_layouts("bfloat16") == (bf16 == "bfloat16")
    assert not found.has_layouts("float64")


@pytest.mark.parametrize(
    ("variable", "value", "isa", "onednn", "aten", "bf16"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx512", "AVX2", "avx512", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16", "avx512", "AVX512_CORE_BF16", "avx512", "bfloat16"),
        ("DNNL_MAX_CPU_ISA", "SSE41", "avx512", "SSE41", "avx512", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "ALL", "avx512", "AVX512_CORE_AMX", "avx512", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx2", "avx512", "AVX512_CORE_AMX", "avx2", "float32"),
        ("ATEN_CPU_CAPABILITY", "default", "avx512", "AVX512_CORE_AMX", "default", "float32"),
        ("JETFLOW_CPU_ISA", "sse42", "sse42", "AVX512_CORE_AMX", "avx512", "float32"),
    ],
)
def test_variables_restrict_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, isa: str, onednn: str, aten: str, bf16: str
) -> None:
    monkeypatch.setenv(variable, value)
    found = machine_of("sapphire rapids")
    assert (found.kernel_isa, found.onednn_level, found.aten_level) == (isa, onednn, aten)
    assert found.computes_in("bfloat16") == bf16


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETFLOW_CPU_ISA", "avx512")
    with pytest.raises(
        ValueError, match=r"JETFLOW_CPU_ISA = 'avx512': this processor \(zen 3\) has avx2, sse42, scalar"
    ):
        _ = machine_of("zen 3").kernel_isa


def test_this_machine() -> None:
    here = machine()
    assert set(here.isas) <= set(ISAS) and here.num_cores >= 1 and here.processor
    assert 2**20 < available_memory_bytes(torch.device("cpu")) <= here.memory_bytes < 2**50


def test_the_first_processor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A 1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: B\n")
    assert module._cpuinfo(path) == (frozenset({"fpu", "avx2"}), "A 1")
    path.write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd40\n")
    assert module._cpuinfo(path) == (frozenset({"fp", "asimd"}), "")
    assert module._cpuinfo(tmp_path / "missing") == (frozenset(), "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=["version 2", "version 2 unlimited", "version 1", "version 1 unlimited", "no files"],
)
def test_quotas(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert module._cpu_quota(tmp_path) == expected


def write_group(folder: Path, version: int, limit: str, *, usage: int = 600, cached: int = 150) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, cache_name = MEMORY_FILES[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 400\n{cache_name} {cached}\n")


def test_memory_that_the_kernel_can_reclaim_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  700 kB\nHugePages_Total:  0\n")
    assert module._host_memory_bytes(meminfo) == 700 * 1024
    assert module._host_memory_bytes(tmp_path / "missing") > 0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 600 + 150), ("400", 0), ("unlimited", sys.maxsize)],
    ids=["limited", "exceeded", "unlimited"],
)
def test_a_container_s_limit_counts(tmp_path: Path, version: int, limit: str, expected: int) -> None:
    none = {1: str(sys.maxsize), 2: "max"}[version]
    write_group(tmp_path, version, none if limit == "unlimited" else limit)
    room = memory_room_bytes(tmp_path, version)
    # Version 1 writes a number where nothing is limited.
    assert room >= 2**60 if limit == "unlimited" else room == expected
    assert memory_room_bytes(tmp_path / "missing", version) == sys.maxsize


@pytest.mark.parametrize(("version", "root"), [(1, "memory"), (2, "")])
def test_groups_above_count_too(tmp_path: Path, version: int, root: str) -> None:
    listed = tmp_path / "cgroup"
    listed.write_text("9:name=systemd:/\n4:cpu,memory:/jobs/7:a\n0::/jobs/7:a\n")
    groups = own_groups("memory", version, mount=tmp_path / "groups", listed=listed)
    mount = tmp_path / "groups" / root
    assert groups == [mount / "jobs" / "7:a", mount / "jobs", mount]
    for own, above in ((1000, 5000), (5000, 1000)):
        write_group(groups[0], version, str(own))
        write_group(groups[1], version, str(above))
        assert min(memory_room_bytes(group, version) for group in groups) == 550
    assert own_groups("memory", version, mount=tmp_path, listed=tmp_path / "missing") == [tmp_path / root]
