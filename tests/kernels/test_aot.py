"""Every Triton kernel compiles for every chip, in every shipped configuration, within the chip's limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def test_nothing_spills_and_all_fits() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-m", "jetflow_kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    faults = [line for line in done.stdout.splitlines() if line.endswith("FAULT")]
    assert done.returncode == 0, "\n".join(faults) or done.stderr[-2000:]
    for chip in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert any(f" {chip} " in line for line in done.stdout.splitlines()), f"nothing was compiled for {chip}"
