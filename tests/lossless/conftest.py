from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.oracle import Oracle
from support.small_models import EOS_ID, write_head, write_target

MAX_LEN = 1024


@pytest.fixture(scope="session")
def fp64_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target64"), max_len=MAX_LEN))


@pytest.fixture(scope="session")
def fp64_head(tmp_path_factory: pytest.TempPathFactory, fp64_target: str) -> str:
    return str(write_head(tmp_path_factory.mktemp("head64"), Path(fp64_target)))


@pytest.fixture(scope="session")
def fp64_oracle(fp64_target: str) -> Oracle:
    return Oracle(Path(fp64_target), torch.float64, frozenset({EOS_ID}), MAX_LEN)
