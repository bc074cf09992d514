"""A tiny model with a chat template, and an engine of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetflow_cluster import LLM, EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from support.router_stack import OPTIONS
from support.small_models import write_chat_template, write_head, write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_target(tmp_path_factory.mktemp("target"), max_len=512)
    write_chat_template(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return write_head(tmp_path_factory.mktemp("head"), target)


@pytest.fixture(scope="module")
def local(target: Path, head: Path) -> LLM:
    return LLM(str(target), str(head), tree_nodes={1: 8}, **OPTIONS)


@pytest.fixture(scope="module")
def frontends(target: Path, head: Path) -> list[EngineFrontend]:
    return [EngineFrontend(EngineConfig(model=str(target), draft_head=str(head), **OPTIONS), tree_nodes={1: 8})]
