"""Every Triton kernel compiles for every chip, in every shipped configuration, within the chip's limits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.beside import Command, Ended

pytest.importorskip("triton")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
COMMAND = Command(
    name="aot",
    arguments=[sys.executable, "-m", "jetflow_kernels.aot"],
    environment=ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent.parent.parent / "kernels")},
)


@pytest.mark.beside(COMMAND)
def test_nothing_spills_and_all_fits(ended: Ended) -> None:
    lines = ended.output.splitlines()
    faults = [line for line in lines if line.endswith("FAULT")]
    assert ended.status == 0, "\n".join(faults) or ended.errors[-2000:]
    for chip in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert any(f" {chip} " in line for line in lines), f"nothing was compiled for {chip}"
