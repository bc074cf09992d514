"""Checkpoints of a small model that every node of this machine sees."""

from __future__ import annotations

import pytest

from support.small_models import write_head, write_target


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Target and draft head, in fp64."""
    target, head = (tmp_path_factory.mktemp(name) for name in ("served_target", "served_head"))
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    return str(target), str(head)
