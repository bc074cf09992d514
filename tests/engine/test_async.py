"""The asyncio front end: interleaved streams, aborts, faults, shutdown."""

from __future__ import annotations

import asyncio

import pytest

from jetflow_cluster import LLM, AsyncLLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import FinishReason, InvalidRequestError

PARAMS = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, speculation=SpeculationOptions(mode="force"))


def _options() -> dict[str, object]:
    return {"dtype": "float64", "num_pages": 128, "page_size": 8, "tree_nodes": {1: 8}}


async def _collect(llm: AsyncLLM, prompt: list[int]) -> list[int]:
    return [t async for delta in llm.generate(prompt, PARAMS) for t in delta.token_ids]


def test_concurrent_streams_equal_batch(tiny_target: str, tiny_head: str) -> None:
    prompts = [[i + 1, i + 2, i + 3] for i in range(6)]
    expected = [o.token_ids for o in LLM(tiny_target, tiny_head, **_options()).generate(prompts, PARAMS)]

    async def run() -> list[list[int]]:
        async with AsyncLLM(tiny_target, tiny_head, **_options()) as llm:
            return await asyncio.gather(*(_collect(llm, p) for p in prompts))

    assert asyncio.run(run()) == expected


def test_leaving_a_stream_frees_its_pages(tiny_target: str, tiny_head: str) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny_target, tiny_head, **_options()) as llm:
            stream = llm.generate([1, 2, 3], PARAMS)
            await anext(stream)
            await stream.aclose()
            await _collect(llm, [4, 5])
            assert llm.stats().num_used_pages == 0

    asyncio.run(run())


def test_abort_ends_the_stream(tiny_target: str, tiny_head: str) -> None:
    async def run() -> list[FinishReason | None]:
        async with AsyncLLM(tiny_target, tiny_head, **_options()) as llm:
            reasons = []
            async for delta in llm.generate([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True), request_id="x"):
                reasons.append(delta.finish_reason)
                await llm.abort("x")
            return reasons

    reasons = asyncio.run(run())
    assert reasons[-1] is FinishReason.ABORT
    assert len(reasons) < 200


def test_a_failed_step_fails_its_requests_only(tiny_target: str, tiny_head: str) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny_target, tiny_head, **_options()) as llm:
            verify = llm.engine.target.verify

            def fail_once(*args: object) -> object:
                llm.engine.target.verify = verify
                raise MemoryError("out of memory")

            llm.engine.target.verify = fail_once
            with pytest.raises(RuntimeError, match="step failed"):
                await _collect(llm, [1, 2, 3])
            assert len(await _collect(llm, [1, 2, 3])) == 30
            assert llm.stats().num_used_pages == 0

    asyncio.run(run())


def test_bad_requests_and_a_closed_engine(tiny_target: str, tiny_head: str) -> None:
    async def run() -> None:
        llm = AsyncLLM(tiny_target, tiny_head, **_options())
        with pytest.raises(InvalidRequestError):
            await _collect(llm, [])
        await llm.shutdown()
        await llm.shutdown()
        with pytest.raises(RuntimeError, match="shut down"):
            await _collect(llm, [1])

    asyncio.run(run())
