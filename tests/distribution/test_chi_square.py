"""Output follows the target's distribution: joint chi-square of the second and third token through forced trees."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chi2

from distribution.slow_rules import slow_probabilities
from distribution.toy import STOP_IDS, Accept, MakeTrees, ToyRequest, ToyTarget, decode_step, root_trees
from jetflow_cluster.tree.accept import AcceptedPath, Choose, accept_trees
from jetflow_cluster.tree.build import build_trees
from jetflow_cluster.tree.coupled import DraftSampling, candidate_tables
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams

VOCAB = 8
NUM_SEEDS = 2000
PROMPT = [2, 5, 3]
#: Siblings under every inner node; the trees are complete to depth 2.
NUM_SIBLINGS = 4
NUM_NODES = 1 + NUM_SIBLINGS + NUM_SIBLINGS**2

OPTIONS: dict[str, dict] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "filters": {"top_k": 6, "top_p": 0.9, "min_p": 0.03},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.8},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {0: 1.0, 6: -1.5}},
    "min_tokens": {"min_tokens": 3},
    "everything": {
        "temperature": 0.8,
        "top_k": 7,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {2: 0.7},
        "min_tokens": 2,
    },
}


def exact_joint(target: ToyTarget, params: SamplingParams) -> dict[tuple[int, int], float]:
    """Probability of each pair of second and third token, by enumeration."""

    def next_token(output: list[int]) -> list[float]:
        logits = target.logits([PROMPT + output])[0].tolist()
        suppressed = STOP_IDS if len(output) < params.min_tokens else ()
        return slow_probabilities(logits, params, PROMPT, output, suppressed)

    joint: Counter[tuple[int, int]] = Counter()
    for first, p_first in enumerate(next_token([])):
        for second, p_second in enumerate(next_token([first])):
            for third, p_third in enumerate(next_token([first, second])):
                joint[second, third] += p_first * p_second * p_third
    return dict(joint)


def chi_square_p(observed: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    """Significance of the deviation; rare cells are pooled. Zero when something impossible was seen."""
    num = sum(observed.values())
    if any(observed[cell] and expected[cell] == 0.0 for cell in observed):
        return 0.0
    cells = [(observed[cell], num * p) for cell, p in expected.items() if num * p >= 5.0]
    rare = [(observed[cell], num * p) for cell, p in expected.items() if 0.0 < num * p < 5.0]
    if sum(e for _, e in rare) >= 5.0:
        cells.append((sum(o for o, _ in rare), sum(e for _, e in rare)))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def forced_trees(draft: ToyTarget, *, coupled: bool) -> MakeTrees:
    """Complete trees of a draft model whose depths do not know each other."""
    cache: dict[tuple[int, ...], DraftTree] = {}

    def draft_logits(contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        first = draft.logits(contexts)
        return torch.stack(
            (first, draft.logits([[c[-1], t] for c, t in zip(contexts, first.argmax(-1), strict=True)])), 1
        )

    def build(contexts: Sequence[list[int]], sampling: Sequence[DraftSampling | None]) -> list[DraftTree]:
        anchors = [context[-1] for context in contexts]
        tables = candidate_tables(draft_logits(contexts), width=NUM_SIBLINGS, anchor_ids=anchors, sampling=sampling)
        num = len(contexts)
        return build_trees(tables, anchors, max_nodes=[NUM_NODES] * num, max_depths=[2] * num)

    def make(requests: Sequence[ToyRequest]) -> list[DraftTree]:
        contexts = [(request.prompt + request.output)[-2:] for request in requests]
        if coupled:
            return build(
                contexts,
                [
                    DraftSampling(
                        temperature=r.params.temperature, seed=r.seed, anchor_position=len(r.prompt + r.output) - 1
                    )
                    for r in requests
                ],
            )
        missing = [list(key) for key in {tuple(context) for context in contexts} - cache.keys()]
        if missing:
            built = build(missing, [None] * len(missing))
            cache.update(zip(map(tuple, missing), built, strict=True))
        return [cache[tuple(context)] for context in contexts]

    return make


def accept_plausible_sibling(trees: Sequence[DraftTree], choose: Choose) -> list[AcceptedPath]:
    """Wrong: where no child carries the target's token, the walk goes on with the likeliest child."""
    tokens = [tree.children_by_token() for tree in trees]

    def lenient(walking: list[tuple[int, int, list[int]]]) -> list[int]:
        chosen = choose(walking)
        for i, (r, node, _) in enumerate(walking):
            children = trees[r].children(node)
            if children and (node, chosen[i]) not in tokens[r]:
                chosen[i] = trees[r].token_ids[children[0]]
        return chosen

    return accept_trees(trees, lenient)


def sample_pairs(
    target: ToyTarget, params: SamplingParams, make_trees: MakeTrees, accept: Accept = accept_trees
) -> tuple[Counter[tuple[int, int]], float]:
    """Second and third tokens over many seeds, and accepted guesses per request in the first tree."""
    rng = random.Random(7)
    requests = [ToyRequest(params, rng.randrange(2**64), PROMPT) for _ in range(NUM_SEEDS)]
    decode_step(target, requests, root_trees)
    paths = decode_step(target, requests, make_trees, accept)
    while short := [request for request in requests if len(request.output) < 3]:
        decode_step(target, short, make_trees, accept)
    pairs = Counter((request.output[1], request.output[2]) for request in requests)
    return pairs, sum(path.num_accepted for path in paths) / NUM_SEEDS


@pytest.fixture(scope="module")
def target() -> ToyTarget:
    return ToyTarget(VOCAB, seed=0, spread=1.2)


@pytest.fixture(scope="module")
def draft(target) -> ToyTarget:
    other = ToyTarget(VOCAB, seed=1)
    other.table = target.table + 0.7 * other.table
    return other


def test_forced_trees_have_four_siblings(draft):
    requests = [ToyRequest(SamplingParams(), 5, PROMPT)]
    for coupled in (False, True):
        tree = forced_trees(draft, coupled=coupled)(requests)[0]
        tree.validate()
        assert [len(tree.children(i)) for i in range(tree.num_nodes) if tree.depths[i] < 2] == [NUM_SIBLINGS] * 5


@pytest.mark.parametrize("name", OPTIONS)
def test_joint_distribution_is_the_targets(target, draft, name):
    params = SamplingParams(**OPTIONS[name])
    pairs, num_accepted = sample_pairs(target, params, forced_trees(draft, coupled=False))
    assert num_accepted > 0.3
    assert chi_square_p(pairs, exact_joint(target, params)) > 1e-4


@pytest.mark.parametrize("name", ["plain", "filters", "penalties", "everything"])
def test_joint_distribution_with_coupled_trees(target, draft, name):
    params = SamplingParams(**OPTIONS[name])
    pairs, num_accepted = sample_pairs(target, params, forced_trees(draft, coupled=True))
    assert num_accepted > 1.0
    assert chi_square_p(pairs, exact_joint(target, params)) > 1e-4


def test_coupling_pays(target, draft):
    params = SamplingParams()
    lengths = [sample_pairs(target, params, forced_trees(draft, coupled=coupled))[1] for coupled in (False, True)]
    assert lengths[1] > 1.15 * lengths[0]


@pytest.mark.parametrize("name", ["plain", "filters", "penalties", "everything"])
def test_an_acceptor_of_plausible_siblings_fails(target, draft, name):
    params = SamplingParams(**OPTIONS[name])
    pairs, _ = sample_pairs(target, params, forced_trees(draft, coupled=False), accept_plausible_sibling)
    assert chi_square_p(pairs, exact_joint(target, params)) < 1e-9
