"""Checkpoints that tests of every package may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs measured in tests are kept apart, for these tests and the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETFLOW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random fp32 target with a byte-level tokenizer and 512 positions."""
    import torch

    from support.small_models import write_target

    return write_target(tmp_path_factory.mktemp("tiny_target"), dtype=torch.float32, num_layers=4, max_len=512)


@pytest.fixture(scope="session")
def tiny_head_dir(tmp_path_factory: pytest.TempPathFactory, tiny_target_dir: Path) -> Path:
    """A random draft head that fits `tiny_target_dir`."""
    from support.small_models import write_head

    return write_head(tmp_path_factory.mktemp("tiny_head"), tiny_target_dir)
