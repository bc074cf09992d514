"""Trees of steps over HTTP: those of the engine, in each chunk of a stream that asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.tree.build import SCORE_UNIT
from support.router_stack import Stack, stack
from support.toy_cluster import run

KINDS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "ab(c) " * 8},
    "chat/completions": {"messages": [{"role": "user", "content": "ab(c) " * 8}]},
}
BODY = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "stream": True, "return_token_ids": True}
TREES = {"speculation": {"mode": "force", "include_trees": True}}


async def chunks(made: Stack, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{made.router.http_port}/v1/{path}"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        lines = (await answer.text()).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]


@pytest.mark.parametrize("path", list(KINDS))
def test_chunks_tell_the_steps(frontends: list[EngineFrontend], target: Path, path: str) -> None:
    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made:
            records: list[StepRecord] = []
            frontends[0].engine.on_step = records.append
            found = await chunks(made, path, KINDS[path] | BODY | TREES)
            frontends[0].engine.on_step = None
            entries = [entry for step in records for entry in step.requests]
            steps = [chunk for chunk in found if "num_accepted" in chunk.get("jetflow", {})]
            assert len(steps) == len(entries) > 5
            decode = made.router._codec.token_text  # type: ignore[union-attr]
            for chunk, entry in zip(steps, entries, strict=True):
                told = chunk["jetflow"]
                assert told["token_ids"] == chunk["choices"][0]["token_ids"] == entry.token_ids
                assert told["token_texts"] == [decode(token) for token in entry.token_ids]
                tree = told["tree"]
                if tree is None:
                    assert chunk is steps[0]
                    continue
                assert (tree["token_ids"], tree["parents"]) == (entry.tree.token_ids, entry.tree.parents)
                assert tree["accepted_nodes"] == entry.accepted_nodes
                assert tree["token_texts"] == [decode(token) for token in entry.tree.token_ids]
                assert tree["path_logprobs"] == [float(np.float32(s / SCORE_UNIT)) for s in entry.tree.scores]
                assert set(tree["sources"]) <= {"anchor", "head", "context", "head_and_context"}
            # What nobody asks for is not there.
            plain = await chunks(made, path, KINDS[path] | BODY | {"speculation": {"mode": "force"}})
            assert all("jetflow" not in chunk for chunk in plain[:-1])
            await made.is_idle()

    run(test, 120)


@pytest.mark.parametrize(
    "change, field",
    [
        pytest.param({"stream": False}, "speculation.include_trees", id="whole"),
        pytest.param({"speculation": {"include_trees": "yes"}}, "speculation.include_trees", id="type"),
    ],
)
def test_what_cannot_be_told_is_refused(
    frontends: list[EngineFrontend], target: Path, change: dict[str, Any], field: str
) -> None:
    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made:
            url = f"http://127.0.0.1:{made.router.http_port}/v1/completions"
            async with aiohttp.ClientSession() as session:
                answer = await session.post(url, json=KINDS["completions"] | BODY | TREES | change)
                assert (answer.status, (await answer.json())["error"]["param"]) == (400, field)

    run(test, 120)
