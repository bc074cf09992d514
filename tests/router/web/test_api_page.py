"""What the page about the API says is so: its snippets run, and its table has every code."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.router.callers import Limits, TokenFile
from jetflow_cluster.router.web.errors import _HTTP
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from support.router_stack import stack
from support.toy_cluster import run

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)


def test_snippets_run(frontends: list[EngineFrontend], target: Path) -> None:
    pytest.importorskip("openai")

    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made:

            def placed(text: str) -> str:
                text = text.replace("localhost:8000", f"127.0.0.1:{made.router.http_port}")
                return text.replace("localhost:9000", f"127.0.0.1:{made.router.port}")

            for snippet in blocks("python"):
                await asyncio.to_thread(exec, placed(snippet), {})
            if shutil.which("curl"):
                for snippet in blocks("sh"):
                    command = ["bash", "-e", "-c", placed(snippet)]
                    await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)

    assert len(blocks("python")) == 2 and len(blocks("sh")) == 1
    run(test, 240)


def test_every_code_and_method_is_there() -> None:
    for code, (http, _, _) in _HTTP.items():
        assert re.search(rf"^\| `{code.name}` \| {http} \|", PAGE, re.MULTILINE), code
    for method in pb.DESCRIPTOR.services_by_name["JetFlowInference"].methods:
        assert f"`{method.name}`" in PAGE


def test_the_file_of_tokens_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "tokens.yaml").write_text("\n".join(line.strip() for line in text.splitlines()))
    assert TokenFile(tmp_path / "tokens.yaml", Limits()).caller("Bearer at-least-sixteen-characters") is not None
