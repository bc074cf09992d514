"""Requests of every kind of sampling that join a running batch one by one."""

from __future__ import annotations

import random
from typing import Any

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import RequestOutput, SpeculationMode


def options_of(rng: random.Random, *, sampled: bool, filters: bool, changes: bool) -> SamplingParams:
    mode = rng.choice([SpeculationMode.AUTO, SpeculationMode.FORCE, SpeculationMode.OFF, SpeculationMode.FORCE])
    nodes = rng.choice([2, 5, 9, 20]) if mode is SpeculationMode.FORCE else None
    return SamplingParams(
        max_tokens=rng.randint(4 if changes else 1, 24),
        temperature=rng.choice([0.6, 1.0, 1.4]) if sampled else 0.0,
        seed=rng.randrange(2**64),
        top_k=rng.choice([0, 5, 40]) if filters else 0,
        top_p=rng.choice([1.0, 0.8]) if filters else 1.0,
        min_p=rng.choice([0.0, 0.1]) if filters else 0.0,
        **(changes_of(rng) if changes else {}),
        speculation=SpeculationOptions(mode=mode, max_tree_nodes=nodes),
    )


def changes_of(rng: random.Random) -> dict[str, Any]:
    """Penalties, biases, tokens that may not be chosen yet, and reported log-probabilities; each of them or not."""
    stop = rng.randrange(256)
    return {
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "presence_penalty": rng.choice([0.0, 0.7]),
        "frequency_penalty": rng.choice([0.0, 0.4]),
        "logit_bias": rng.choice([{}, {stop: 8.0}, {stop: 8.0, 3: 1.5, 17: -100.0}]),
        "stop_token_ids": rng.choice([(), (stop,)]),
        "min_tokens": rng.choice([0, 4]),
        "logprobs": rng.choice([None, 0, 3]),
    }


def requests_of(seed: int, kind: str, num: int = 7) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    found = []
    for i in range(num):
        sampled = kind in ("sampled", "filtered") or (kind in ("mixed", "changed") and i % 2 == 1)
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 14))]
        filters = kind == "filtered" or (kind == "changed" and i % 3 == 0)
        found.append((prompt, options_of(rng, sampled=sampled, filters=filters, changes=kind == "changed")))
    return found


def run_joining(llm: LLM, given: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    """Requests join one by one, every third step, and leave as they end."""
    made: list[Request] = []
    steps = 0
    while len(made) < len(given) or llm.engine.has_work:
        if len(made) < len(given) and steps % 3 == 0:
            prompt, params = given[len(made)]
            made.append(llm.frontend.make_request(f"r{len(made)}", prompt, params))
            llm.engine.add(made[-1])
        llm.engine.step()
        steps += 1
    for request in made:
        assert request.error is None, request.error
    return [request.output() for request in made]
