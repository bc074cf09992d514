from __future__ import annotations

from pathlib import Path

import pytest

from support.small_models import write_head, write_target


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target"), max_len=256))


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory: pytest.TempPathFactory, tiny_target: str) -> str:
    return str(write_head(tmp_path_factory.mktemp("head"), Path(tiny_target)))
