from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from support.small_models import write_head, write_target

OPTIONS: dict[str, Any] = {"dtype": "float64", "device": "cpu", "num_pages": 96, "page_size": 8, "max_num_requests": 16}

#: Makes an engine with a head; the arguments are fields of `EngineConfig`.
MakeFrontend = Callable[..., EngineFrontend]


@pytest.fixture(scope="session")
def fp64_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target64"), max_len=512)


@pytest.fixture(scope="session")
def fp64_head(tmp_path_factory: pytest.TempPathFactory, fp64_target: Path) -> Path:
    return write_head(tmp_path_factory.mktemp("head64"), fp64_target)


@pytest.fixture(scope="session")
def make_frontend(fp64_target: Path, fp64_head: Path) -> MakeFrontend:
    def make(**options: Any) -> EngineFrontend:
        config = EngineConfig(model=str(fp64_target), draft_head=str(fp64_head), **(OPTIONS | options))
        return EngineFrontend(config, tree_nodes={1: 8})

    return make


@pytest.fixture(scope="session")
def local(fp64_target: Path, fp64_head: Path) -> LLM:
    """An engine of its own, for what a replica has to equal."""
    return LLM(str(fp64_target), str(fp64_head), tree_nodes={1: 8}, **OPTIONS)


@pytest.fixture(scope="module")
def idle_frontend(make_frontend: MakeFrontend) -> EngineFrontend:
    return make_frontend()


@pytest.fixture
def frontend(idle_frontend: EngineFrontend) -> Iterator[EngineFrontend]:
    """An engine for one test, which must leave no page used behind."""
    yield idle_frontend
    stats = idle_frontend.engine.stats()
    assert (stats.num_used_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages
    idle_frontend.engine.pool.check()
