"""Tests that need a CUDA device; `make test-gpu` runs them. They need no installation and no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.oracle import Oracle
from support.small_models import EOS_ID, write_head, write_target

MAX_LEN = 512


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products of fp32 in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert not torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small random target whose head size the kernels have, and a draft head for it."""
    target = write_target(
        tmp_path_factory.mktemp("gpu_target"), dtype=torch.float32, num_layers=4, max_len=MAX_LEN, head_dim=64
    )
    return target, write_head(tmp_path_factory.mktemp("gpu_head"), target)


@pytest.fixture(scope="session")
def oracle(folders: tuple[Path, Path]) -> Oracle:
    """The same weights in fp64, by `transformers` on the CPU."""
    return Oracle(folders[0], torch.float64, frozenset({EOS_ID}), MAX_LEN)
