"""A stream that broke gives what the engine gives in one go, tokens and text, greedy and sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, AsyncLLM
from jetflow_cluster.rpc.client import JetFlowClient
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.retry import RetryPolicy
from jetflow_cluster.types import RequestDelta, RequestOutput, SamplingParams, SpeculationOptions
from support.api_server import ApiServer, api_server, fail_after

PROMPT = "for i in range(3):"
FAST = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.01, quarantine_s=0.0)
OPTIONS: dict[str, Any] = {"dtype": "float64", "tree_nodes": {1: 8}, "max_num_requests": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def local(tiny_target_dir: Path, tiny_head_dir: Path) -> LLM:
    return LLM(str(tiny_target_dir), str(tiny_head_dir), **OPTIONS)


@pytest.fixture(scope="module")
def server(tiny_target_dir: Path, tiny_head_dir: Path) -> Iterator[ApiServer]:
    engine = AsyncLLM(str(tiny_target_dir), str(tiny_head_dir), **OPTIONS)

    def generate(prompt: str | list[int], params: SamplingParams, request_id: str) -> AsyncIterator[RequestDelta]:
        return engine.generate(prompt, params, request_id=request_id)

    with api_server(generate) as running:
        try:
            yield running
        finally:
            running.run(engine.shutdown())


def with_breaks(server: ApiServer, params: SamplingParams, num_events: int) -> tuple[RequestOutput, int]:
    """The output of a request whose calls all break behind so many events, as long as they get on."""
    server.servicer.faults = [fail_after(num_events, StatusError.unavailable("gone")) for _ in range(60)]
    with (
        JetFlowClient(server.address, retry=FAST, timeout_s=300) as client,
        client.stream(PROMPT, params) as stream,
    ):
        offsets = [(delta.offset, len(delta.token_ids)) for delta in stream]
        assert all(start + count == after for (start, count), (after, _) in pairwise(offsets))
        return stream.output, stream.num_calls


@pytest.mark.parametrize("num_events", [2, 3, 5])
@pytest.mark.parametrize("mode", ["off", "force"])
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5}, id="sampled"),
    ],
)
def test_resumed_streams_are_those_of_the_engine(
    local: LLM, server: ApiServer, sampling: dict[str, Any], mode: str, num_events: int
) -> None:
    speculation = SpeculationOptions(mode=mode, max_tree_nodes=6)
    params = SamplingParams(max_tokens=24, ignore_eos=True, speculation=speculation, **sampling)
    expected = local.generate(PROMPT, params)[0]
    found, num_calls = with_breaks(server, params, num_events)
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
    assert (found.finish_reason, found.seed) == (
        expected.finish_reason,
        expected.seed if sampling.get("seed") else found.seed,
    )
    assert num_calls > 1


def test_stop_strings_over_a_break_end_the_text_where_they_would(local: LLM, server: ApiServer) -> None:
    whole = local.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))[0]
    stop = next(whole.text[i : i + 3] for i in range(4, len(whole.text)) if "\ufffd" not in whole.text[i : i + 3])
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=stop)
    expected = local.generate(PROMPT, params)[0]
    found, num_calls = with_breaks(server, params, 2)
    assert (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    assert num_calls > 1
