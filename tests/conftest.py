"""Checkpoints that tests of every package may use, and the compilation that goes on beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.ahead_of_time import AheadOfTime

_AHEAD = pytest.StashKey[AheadOfTime]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of what is compiled ahead of time come last: minutes of compilation go on beside the others."""
    items.sort(key=lambda item: "ahead_of_time" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins the compilation, where a test that was chosen needs it."""
    last = session.items[-1:]
    if last and "ahead_of_time" in getattr(last[0], "fixturenames", ()) and not session.config.option.collectonly:
        session.config.stash[_AHEAD] = AheadOfTime()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends it."""
    if (ahead := session.config.stash.get(_AHEAD, None)) is not None:
        ahead.close()


@pytest.fixture(scope="session")
def ahead_of_time(pytestconfig: pytest.Config) -> AheadOfTime:
    """Every kernel in every shipped configuration, compiled since the tests began."""
    return pytestconfig.stash[_AHEAD]


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
