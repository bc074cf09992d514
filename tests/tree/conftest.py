"""Trees are grown in C and in Python, and are the same."""

from __future__ import annotations

import pytest

from jetflow_cluster.tree import build
from jetflow_kernels.cpu import cpu_kernels


@pytest.fixture(params=["c", "python"])
def grown_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who grows the trees of the test."""
    if request.param == "python":
        monkeypatch.setattr(build, "grow_trees", lambda *tables, **limits: None)
    elif cpu_kernels().functions is None:
        pytest.skip(cpu_kernels().detail)
