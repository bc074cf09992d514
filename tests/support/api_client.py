"""Both clients behind one face, so that a test can run with either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from jetflow_cluster.rpc.client import AsyncJetFlowClient, JetFlowClient
from jetflow_cluster.rpc.retry import RetryPolicy
from jetflow_cluster.types import FinishReason, RequestDelta, RequestOutput, SamplingParams
from support.api_server import toy_text, toy_tokens

FAST = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.01, quarantine_s=0.0)
TIMEOUT_S = 120.0
PROMPT = "def add(a, b):"
KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


def use(kind: str, servers: Any, act: Callable[[Any], Any], retry: RetryPolicy = FAST, **options: Any) -> Any:
    """Calls `act` with a client; what it returns or awaits is returned."""
    if kind == "sync":
        with JetFlowClient(servers, retry=retry, timeout_s=TIMEOUT_S, **options) as client:
            return act(client)

    async def run() -> Any:
        async with AsyncJetFlowClient(servers, retry=retry, timeout_s=TIMEOUT_S, **options) as client:
            return await act(client)

    return asyncio.run(run())


def stream(
    kind: str,
    servers: Any,
    params: SamplingParams,
    *,
    on_delta: Callable[[Any, RequestDelta], None] = lambda stream, delta: None,
    retry: RetryPolicy = FAST,
    prompt: Any = PROMPT,
    **options: Any,
) -> tuple[list[RequestDelta], RequestOutput, Any]:
    """All deltas of a request, its output, and the stream."""
    deltas: list[RequestDelta] = []

    def act(client: Any) -> Any:
        found = client.stream(prompt, params, **options)
        if kind == "sync":
            with found:
                for delta in found:
                    deltas.append(delta)
                    on_delta(found, delta)
            return found
        return collect(found)

    async def collect(found: Any) -> Any:
        async with found:
            async for delta in found:
                deltas.append(delta)
                on_delta(found, delta)
        return found

    found = use(kind, servers, act, retry)
    return deltas, found.output, found


def assert_whole(deltas: list[RequestDelta], output: RequestOutput, params: SamplingParams, seed: int) -> None:
    """The request is what an unbroken one would be."""
    expected = toy_tokens(PROMPT, seed, params.max_tokens)
    assert output.token_ids == [token for delta in deltas for token in delta.token_ids] == expected
    assert output.text == "".join(delta.text for delta in deltas) == toy_text(expected)
    assert [delta.offset for delta in deltas] == [sum(len(d.token_ids) for d in deltas[:i]) for i in range(len(deltas))]
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]
    assert output.finish_reason is FinishReason.LENGTH
    assert output.usage.completion_tokens == params.max_tokens
