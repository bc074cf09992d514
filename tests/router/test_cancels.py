"""Requests that are cancelled, in every way and at any moment, leave no work and no page behind."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path

import pytest

from jetflow_cluster import SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.types import FinishReason
from support.router_stack import Stack, stack
from support.toy_cluster import run, until

PROMPT = "for i in range(3):"
WAYS = ("call", "deadline", "abort", "client gone")
#: Requests at a time.
NUM_CONCURRENT = 8


@pytest.mark.parametrize("num_requests", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_cancelled_requests_leave_nothing(frontends: list[EngineFrontend], target: Path, num_requests: int) -> None:
    rng = random.Random(num_requests)
    freed_s: list[float] = []

    async def test() -> None:
        async with stack(frontends, target) as made:
            for first in range(0, num_requests, NUM_CONCURRENT):
                batch = range(first, first + NUM_CONCURRENT)
                ends = await asyncio.gather(*(_cancel(made, i, rng.random()) for i in batch))
                began = max(ends)
                await made.is_idle()
                freed_s.append(max(0.0, time.monotonic() - began))
            await until(lambda: made.router.num_running == 0)
            assert made.router._dispatcher.admission.num_waiting == 0
            links = made.router._dispatcher.replicas.links
            assert [(link.own_tokens, link.num_flights) for link in links] == [(0, 0)] * 2

    run(test, 900)
    print(
        f"idle {statistics.median(freed_s) * 1e3:.0f} ms behind the last cancel (median), {max(freed_s):.2f} s at most"
    )
    assert max(freed_s) < 2.0


async def _cancel(made: Stack, index: int, moment: float) -> float:
    """Runs a request until it is cancelled; half of them right behind a delta. Returns when that was."""
    way = WAYS[index // 2 % len(WAYS)]
    params = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.7 * (index % 3 > 0), seed=index)
    timeout_s = 0.02 + 0.2 * moment if way == "deadline" else None
    address = f"127.0.0.1:{made.router.port}"
    client = AsyncJetFlowClient(address, timeout_s=100) if way == "client gone" else made.client
    ended = time.monotonic()
    try:
        async with client.stream(PROMPT, params, timeout_s=timeout_s) as stream:
            if index % 2:
                for _ in range(1 + int(4 * moment)):
                    await anext(stream)
            else:
                reader = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.1 * moment)
                if not reader.done() and way != "deadline":
                    stream.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            ended = time.monotonic()
            if way == "abort" and stream.request_id:
                await client.abort(stream.request_id)
            elif way == "client gone":
                await client.close()
            elif way != "deadline":
                stream.cancel()
            async for _ in stream:
                pass
        assert stream.output.finish_reason in (FinishReason.ABORT, None), stream.output.finish_reason
    except StatusError:
        if way not in ("deadline", "client gone"):
            raise
    except (asyncio.CancelledError, StopAsyncIteration):
        pass
    finally:
        if client is not made.client:
            await client.close()
    return max(ended, time.monotonic()) if way == "deadline" else ended
