"""A router before real replicas of a tiny model: the tokens and text are those of the engine, whatever breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.types import RequestOutput, SpeculationOptions
from support.router_stack import stack
from support.toy_cluster import run

PROMPT = "for i in range(3):"


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5},
    "logprobs": {"temperature": 1.0, "seed": 12, "logprobs": 2},
    "off": {"temperature": 1.0, "seed": 13, "speculation": SpeculationOptions(mode="off")},
}


def check(found: RequestOutput, wanted: RequestOutput) -> None:
    """The served output is the engine's."""
    assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
    assert (found.finish_reason, found.matched_stop) == (wanted.finish_reason, wanted.matched_stop)
    assert found.usage.completion_tokens == wanted.usage.completion_tokens
    if wanted.logprobs is not None:
        assert found.logprobs is not None
        assert [entry.token_id for entry in found.logprobs] == [entry.token_id for entry in wanted.logprobs]


def test_streams_are_those_of_the_engine_over_cut_wires(
    local: LLM, frontends: list[EngineFrontend], target: Path
) -> None:
    params = [SamplingParams(max_tokens=60, ignore_eos=True, **sampling) for sampling in SAMPLING.values()]
    wanted = local.generate([PROMPT] * len(params), params)
    stop = wanted[0].text[20:23]
    params.append(SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0, stop=[stop]))
    wanted += local.generate([PROMPT], params[-1:])

    async def test() -> None:
        async with stack(frontends, target) as made:
            resumes = 0

            async def one(index: int) -> None:
                nonlocal resumes
                stream = made.client.stream(PROMPT, params[index])
                num_deltas = 0
                async for _ in stream:
                    num_deltas += 1
                    if num_deltas in (2, 5) and stream.started is not None:
                        made.wires[num_deltas % 2].cut()
                check(stream.output, wanted[index])
                assert stream.num_calls == 1, "the client noticed nothing"
                assert stream.finished is not None
                resumes += stream.finished.num_resumes

            for index in range(len(params)):
                await one(index)
            await asyncio.gather(*(one(index) for index in range(len(params))))
            assert resumes > 0
            await made.is_idle()

    run(test, 240)


def test_a_replica_that_stops_hands_its_requests_over(
    local: LLM, frontends: list[EngineFrontend], target: Path
) -> None:
    params = SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, seed=5)
    wanted = local.generate([PROMPT], params)[0]

    async def test() -> None:
        async with stack(frontends, target) as made:
            stream = made.client.stream(PROMPT, params)
            async for _ in stream:
                if stream.started is not None and len(stream.output.token_ids) > 10:
                    await made.replicas[int(stream.started.replica_id[-1])].stop()
            check(stream.output, wanted)
            assert stream.num_calls == 1
            assert stream.finished is not None and stream.finished.num_resumes == 1
            await made.is_idle()

    run(test, 240)
