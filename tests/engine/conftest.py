from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.draft_workers import RemoteHeads, remote_heads
from support.small_models import write_head, write_target


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target"), max_len=256))


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory: pytest.TempPathFactory, tiny_target: str) -> str:
    return str(write_head(tmp_path_factory.mktemp("head"), Path(tiny_target)))


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[RemoteHeads]:
    with remote_heads(tmp_path) as heads:
        yield heads
