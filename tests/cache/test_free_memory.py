"""What memory there is: of the machine, and of the container in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jetflow_cluster.cache import free_memory

NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def write_group(folder: Path, version: int, limit: str, *, usage: int = 600, cached: int = 150) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, cache_name = NAMES[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 400\n{cache_name} {cached}\n")


def test_memory_of_this_machine() -> None:
    assert 2**20 < free_memory.available_memory_bytes(torch.device("cpu")) < 2**50


def test_memory_that_the_kernel_can_reclaim_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  700 kB\nHugePages_Total:  0\n")
    assert free_memory._host_memory_bytes(meminfo) == 700 * 1024
    assert free_memory._host_memory_bytes(tmp_path / "missing") > 0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 600 + 150), ("400", 0), ("unlimited", sys.maxsize)],
    ids=["limited", "exceeded", "unlimited"],
)
def test_a_container_s_limit_counts(tmp_path: Path, version: int, limit: str, expected: int) -> None:
    none = {1: str(sys.maxsize), 2: "max"}[version]
    write_group(tmp_path, version, none if limit == "unlimited" else limit)
    room = free_memory.container_memory_bytes(tmp_path, "/", version=version)
    # Version 1 writes a number where nothing is limited.
    assert room >= 2**60 if limit == "unlimited" else room == expected
    assert free_memory.container_memory_bytes(tmp_path / "missing", "/", version=version) == sys.maxsize


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "above", "expected"), [(1000, 5000, 550), (5000, 1000, 550)], ids=["own group", "group above"]
)
def test_the_tightest_level_counts(tmp_path: Path, version: int, own: int, above: int, expected: int) -> None:
    write_group(tmp_path / "slice" / "job", version, str(own))
    write_group(tmp_path / "slice", version, str(above))
    assert free_memory.container_memory_bytes(tmp_path, "/slice/job", version=version) == expected


def test_a_group_that_the_container_does_not_see_is_its_root(tmp_path: Path) -> None:
    write_group(tmp_path, 1, "1000")
    assert free_memory.container_memory_bytes(tmp_path, "/docker/0123", version=1) == 550


def test_groups_by_controller(tmp_path: Path) -> None:
    path = tmp_path / "cgroup"
    path.write_text("9:name=systemd:/\n4:cpu,memory:/jobs/7:a\n0::/user.slice\n")
    assert free_memory._own_groups(path) == {
        "name=systemd": "/",
        "cpu": "/jobs/7:a",
        "memory": "/jobs/7:a",
        "": "/user.slice",
    }
    assert free_memory._own_groups(tmp_path / "missing") == {}
