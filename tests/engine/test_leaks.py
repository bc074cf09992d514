"""Free, used and cached pages always add up, and nothing is used once nothing runs."""

from __future__ import annotations

import random

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import FinishReason
from support.adversaries import Adversary, NoDrafter
from support.small_models import VOCAB_SIZE


class _Fault(Exception):
    pass


@pytest.mark.parametrize("source", ["head", "random"])
def test_a_thousand_requests_leak_nothing(tiny_target: str, tiny_head: str, source: str) -> None:
    rng = random.Random(3)
    by_head = source == "head"
    llm = LLM(
        tiny_target,
        tiny_head if by_head else None,
        dtype="float32",
        num_pages=40,
        page_size=8,
        max_num_requests=12,
        max_prompt_chunk=24,
        tree_nodes={12: 9},
        drafter_factory=None if by_head else lambda *_: NoDrafter(),
        tree_builder=None if by_head else Adversary("random", lambda request: [], VOCAB_SIZE),
    )
    engine = llm.engine
    verify = engine.target.verify

    def verify_or_fail(*args: object) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if rng.random() < 0.02:
            raise _Fault("thrown into the step")
        return verify(*args)

    engine.target.verify = verify_or_fail
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(60)]
    num_requests = 1000
    reasons: list[FinishReason | None] = []
    requests = []
    for i in range(num_requests):
        length = rng.choice([1, 7, 8, 9, 40, 100])
        prompt = (shared[: length // 2] + [rng.randrange(VOCAB_SIZE) for _ in range(length)])[:length]
        params = SamplingParams(
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            stop=rng.choice([(), ("a",), ("e", "xy")]),
            speculation=SpeculationOptions(
                mode=rng.choice(["auto", "off", "force"]), max_tree_nodes=rng.choice([None, 2, 9])
            ),
        )
        requests.append(llm.frontend.make_request(f"r{i}", prompt, params))
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[: rng.randrange(4)]:
            engine.add(request)
            waiting.remove(request)
        engine.step()
        if engine.requests and rng.random() < 0.2:
            engine.abort(rng.choice(list(engine.requests)))
        stats = llm.stats()
        assert stats.num_free_pages + stats.num_used_pages + stats.num_cached_pages == stats.num_pages
    reasons = [request.finish_reason for request in requests]
    stats = llm.stats()
    assert stats.num_used_pages == 0
    assert stats.num_preemptions > 0
    assert {FinishReason.ABORT, FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP} <= set(reasons)
    engine.pool.check()
