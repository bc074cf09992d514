"""First come, first served; the latest gives way; prompts and trees share the rows of a step."""

from __future__ import annotations

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.request import Request, RequestStatus

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, speculation=SpeculationOptions(mode="off"))


def _add(llm: LLM, count: int, length: int, params: SamplingParams = PARAMS) -> list[Request]:
    requests = [
        llm.frontend.make_request(f"r{i}", [(7 * i + j) % 250 for j in range(length)], params) for i in range(count)
    ]
    for request in requests:
        llm.engine.add(request)
    return requests


def test_admission_follows_arrival(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float32", num_pages=64, page_size=8, max_num_requests=2)
    requests = _add(llm, 5, 10)
    order: list[str] = []
    while llm.engine.has_work:
        order += [d.request_id for d in llm.engine.step() if d.offset == 0]
    assert order == [r.request_id for r in requests]


def test_a_long_request_at_the_head_is_not_overtaken(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float32", num_pages=12, page_size=8, enable_prefix_cache=False)
    first = _add(llm, 1, 60)[0]
    llm.engine.step()
    long = llm.frontend.make_request("long", [1] * 60, PARAMS)
    short = llm.frontend.make_request("short", [2] * 4, PARAMS)
    llm.engine.add(long)
    llm.engine.add(short)
    llm.engine.step()
    # The short one would fit; it waits behind the long one.
    assert (long.status, short.status) == (RequestStatus.WAITING, RequestStatus.WAITING)
    while llm.engine.has_work:
        llm.engine.step()
    assert [len(r.token_ids) - len(r.prompt_token_ids) for r in (first, long, short)] == [12, 12, 12]


def test_the_latest_arrival_is_preempted(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float32", num_pages=5, page_size=8, enable_prefix_cache=False)
    requests = _add(llm, 2, 15)
    while llm.engine.has_work:
        llm.engine.step()
    assert requests[0].num_preemptions == 0
    assert requests[1].num_preemptions > 0
    assert llm.stats().num_preemptions == requests[1].num_preemptions


@pytest.mark.parametrize("chunk", [5, 16, None], ids=str)
def test_rows_of_a_step(tiny_target: str, tiny_head: str, chunk: int | None) -> None:
    llm = LLM(
        tiny_target,
        tiny_head,
        dtype="float32",
        num_pages=128,
        page_size=8,
        max_num_requests=8,
        max_num_batched_tokens=32,
        max_prompt_chunk=chunk,
        tree_nodes={8: 16},
    )
    seen: list[list[int]] = []
    verify = llm.engine.target.verify

    def watch(batch: object, taps: tuple[int, ...]) -> object:
        seen.append(batch.forward.attention.query_lens)  # type: ignore[attr-defined]
        return verify(batch, taps)

    llm.engine.target.verify = watch
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    _add(llm, 6, 50, params)
    while llm.engine.has_work:
        llm.engine.step()
    assert max(sum(lens) for lens in seen) <= 32
    # The first step holds nothing but prompts.
    assert max(seen[0]) == (chunk or 32)
    # Prompt chunks and decoding requests meet in one batch.
    assert any(max(lens) > 1 and len(lens) > 1 for lens in seen)


def test_a_prompt_is_not_starved_by_trees(tiny_target: str, tiny_head: str) -> None:
    llm = LLM(
        tiny_target,
        tiny_head,
        dtype="float32",
        num_pages=128,
        page_size=8,
        max_num_requests=8,
        max_num_batched_tokens=16,
        tree_nodes={8: 64},
    )
    force = SpeculationOptions(mode="force", max_tree_nodes=64)
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, speculation=force)
    _add(llm, 1, 4, long)
    llm.engine.step()
    late = llm.frontend.make_request("late", [3] * 20, PARAMS)
    llm.engine.add(late)
    for _ in range(5):
        llm.engine.step()
    assert late.num_output > 0
