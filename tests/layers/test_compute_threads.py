"""A thread lets go of its OpenMP threads, and computes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from jetflow_cluster.layers import compute_threads
from jetflow_cluster.layers.compute_threads import release_compute_threads

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end_and_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        a = torch.rand(512, 512)
        expected = a @ a
        if not compute_threads._gnu_openmp():
            pytest.skip("torch has another OpenMP here")
        most = num_threads()
        release_compute_threads()
        assert num_threads() < most
        assert torch.equal(a @ a, expected)
        assert num_threads() == most
        release_compute_threads()
        release_compute_threads()
    finally:
        torch.set_num_threads(before)
