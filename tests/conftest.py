"""Checkpoints that tests of every package may use, and the commands that go on beside the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.beside import Beside, Command, Ended

_BESIDE = pytest.StashKey[Beside]()


def _command_of(item: pytest.Item) -> Command | None:
    marker = item.get_closest_marker("beside")
    return marker.args[0] if marker is not None else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a command come last: the command goes on beside the others."""
    items.sort(key=lambda item: _command_of(item) is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins the commands of the tests that were chosen."""
    commands = [command for item in session.items if (command := _command_of(item)) is not None]
    if commands and not session.config.option.collectonly:
        session.config.stash[_BESIDE] = Beside(commands)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends what is left of them."""
    if (beside := session.config.stash.get(_BESIDE, None)) is not None:
        beside.close()


@pytest.fixture
def ended(request: pytest.FixtureRequest) -> Ended:
    """How the command of the test's mark `beside` ended."""
    command = _command_of(request.node)
    assert command is not None, "the test has no mark `beside`"
    return request.config.stash[_BESIDE].wait(command.name)


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
