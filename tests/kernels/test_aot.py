"""Every Triton kernel compiles for every chip, in every shipped configuration, within the chip's limits."""

from __future__ import annotations

import pytest

from support.ahead_of_time import AheadOfTime

pytest.importorskip("triton")


def test_nothing_spills_and_all_fits(ahead_of_time: AheadOfTime) -> None:
    status, lines, errors = ahead_of_time.wait()
    faults = [line for line in lines if line.endswith("FAULT")]
    assert status == 0, "\n".join(faults) or errors[-2000:]
    for chip in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert any(f" {chip} " in line for line in lines), f"nothing was compiled for {chip}"
