"""Seeded output is the same with any tree and without, for every combination of sampling options."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from distribution.slow_rules import slow_choice
from distribution.toy import MakeTrees, ToyRequest, ToyTarget, decode, root_trees
from jetflow_cluster.tree.build import build_trees
from jetflow_cluster.tree.coupled import DraftSampling, candidate_tables
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams

VOCAB = 16
NUM_TOKENS = 12
OPTIONS: list[dict] = [
    {"top_k": 6},
    {"top_p": 0.85},
    {"min_p": 0.04},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.4},
    {"logit_bias": {3: 1.2, 9: -2.0}},
    {"min_tokens": 6},
]


@pytest.fixture(scope="module")
def target() -> ToyTarget:
    return ToyTarget(VOCAB, seed=3)


def all_requests() -> list[ToyRequest]:
    """Every subset of the options, greedy and at two temperatures, seeds and prompts at random: one mixed batch."""
    rng = random.Random(0)
    requests = []
    for switches in itertools.product((False, True), repeat=len(OPTIONS)):
        options: dict = {}
        for option, is_on in zip(OPTIONS, switches, strict=True):
            options |= option if is_on else {}
        temperature = rng.choice((0.0, 0.6, 1.0, 1.0))
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6))]
        requests.append(ToyRequest(SamplingParams(temperature=temperature, **options), rng.randrange(2**64), prompt))
    return requests


@pytest.fixture(scope="module")
def plain_outputs(target) -> list[list[int]]:
    requests = all_requests()
    assert decode(target, requests, NUM_TOKENS, root_trees) == 1.0
    return [request.output for request in requests]


def random_trees(target: ToyTarget, num_nodes: int, helpful: float, num_distinct: int) -> MakeTrees:
    """Random shapes; few distinct tokens give repeated siblings; some nodes carry the target's likeliest token."""
    rng = random.Random(num_nodes)

    def grow(request: ToyRequest) -> DraftTree:
        context = request.prompt + request.output
        tokens, parents, depths, paths = [context[-1]], [-1], [0], [context[-2:]]
        while len(tokens) < num_nodes:
            parent = rng.randrange(max(0, len(tokens) - 6), len(tokens))
            best = int(target.table[paths[parent][-2], paths[parent][-1]].argmax())
            token = best if rng.random() < helpful else rng.randrange(num_distinct)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            paths.append([*paths[parent], token])
        return DraftTree(token_ids=tokens, parents=parents, depths=depths, scores=[0] * num_nodes)

    return lambda requests: [grow(request) for request in requests]


def drafted_trees(target: ToyTarget, num_nodes: int, *, with_sidecar: bool) -> MakeTrees:
    """Trees from the real pipeline: a draft that knows the target roughly, coupled, with or without a side-car."""
    noise = ToyTarget(VOCAB, seed=8, spread=0.8).table
    pairwise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
    correction = SimpleNamespace(parent=pairwise, child=torch.eye(VOCAB))

    def make(requests: Sequence[ToyRequest]) -> list[DraftTree]:
        logits = []
        for request in requests:
            before, last = (request.prompt + request.output)[-2:]
            rows = []
            for _ in range(4):
                rows.append(target.table[before, last] + noise[before, last])
                before, last = last, int(rows[-1].argmax())
            logits.append(torch.stack(rows))
        contexts = [request.prompt + request.output for request in requests]
        anchors = [context[-1] for context in contexts]
        sampling = [
            None
            if r.params.is_greedy
            else DraftSampling(temperature=r.params.temperature, seed=r.seed, anchor_position=len(context) - 1)
            for r, context in zip(requests, contexts, strict=True)
        ]
        tables = candidate_tables(
            torch.stack(logits),
            width=5,
            anchor_ids=anchors,
            sampling=sampling,
            sidecar=correction if with_sidecar else None,
        )
        num = len(requests)
        # The shared budget gives the trees different sizes.
        return build_trees(
            tables, anchors, max_nodes=[2 * num_nodes] * num, max_depths=[4] * num, verify_budget=num_nodes * num
        )

    return make


def test_plain_decoding_follows_the_slow_rules(target, plain_outputs):
    for request, output in zip(all_requests(), plain_outputs, strict=True):
        for i, token in enumerate(output):
            logits = target.logits([request.prompt + output[:i]])[0].tolist()
            position, suppressed = len(request.prompt) + i, request.suppressed(i)
            expected = slow_choice(
                logits, request.params, request.seed, position, request.prompt, output[:i], suppressed
            )
            assert token == expected


TREES = [
    pytest.param(lambda t: random_trees(t, 2, 0.5, VOCAB), 1.05, id="two-nodes"),
    pytest.param(lambda t: random_trees(t, 24, 0.3, VOCAB), 1.2, id="random"),
    pytest.param(lambda t: random_trees(t, 24, 0.5, 2), 1.2, id="repeated-siblings"),
    pytest.param(lambda t: random_trees(t, 24, 0.0, 3), 1.0, id="wrong"),
    pytest.param(lambda t: drafted_trees(t, 12, with_sidecar=False), 1.5, id="drafted"),
    pytest.param(lambda t: drafted_trees(t, 12, with_sidecar=True), 1.5, id="drafted-with-sidecar"),
]


@pytest.mark.parametrize("make_trees, least_tokens_per_step", TREES)
def test_trees_change_no_token(target, plain_outputs, make_trees, least_tokens_per_step):
    requests = all_requests()
    tokens_per_step = decode(target, requests, NUM_TOKENS, make_trees(target))
    assert [request.output[:NUM_TOKENS] for request in requests] == plain_outputs
    assert tokens_per_step >= least_tokens_per_step


def test_batch_does_not_matter(target, plain_outputs):
    requests = all_requests()
    for i in range(0, len(requests), 37):
        alone = copy.deepcopy(requests[i])
        decode(target, [alone], NUM_TOKENS, drafted_trees(target, 16, with_sidecar=True))
        assert alone.output[:NUM_TOKENS] == plain_outputs[i]


def test_resumption_goes_on_with_the_same_tokens(target, plain_outputs):
    requests = all_requests()
    for i in range(0, len(requests), 53):
        for num_prior in range(1, NUM_TOKENS):
            resumed = copy.deepcopy(requests[i])
            resumed.output += plain_outputs[i][:num_prior]
            resumed.counts.extend(resumed.output)
            decode(target, [resumed], NUM_TOKENS, random_trees(target, 8, 0.5, VOCAB))
            assert resumed.output[:NUM_TOKENS] == plain_outputs[i]


def test_other_seeds_give_other_tokens(target, plain_outputs):
    requests = all_requests()
    for request in requests:
        request.seed ^= 1
    decode(target, requests, NUM_TOKENS, root_trees)
    changed = [r.output[:NUM_TOKENS] != plain for r, plain in zip(requests, plain_outputs, strict=True)]
    sampled = [not request.params.is_greedy for request in requests]
    assert sum(changed) > 0.9 * sum(sampled)
    assert not any(c and not s for c, s in zip(changed, sampled, strict=True))
