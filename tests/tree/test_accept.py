"""The walk equals plain greedy decoding, whatever the trees hold."""

from __future__ import annotations

import random

import pytest

from jetflow_cluster.tree.accept import AcceptedPath, accept_trees
from jetflow_cluster.tree.draft_tree import DraftTree

VOCAB = 5


def target(request: int, path: list[int]) -> int:
    """A deterministic target: the token behind the anchor of this request and these tokens."""
    return random.Random(f"{request} {path}").randrange(VOCAB)


def plain_greedy(request: int, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens.append(target(request, tokens))
    return tokens


def random_tree(rng: random.Random, request: int, num_nodes: int, *, helpful: float) -> DraftTree:
    """Random shape and tokens, siblings with equal tokens included; some nodes carry what the target says."""
    tokens, parents, depths, paths = [rng.randrange(VOCAB)], [-1], [0], [[]]
    for i in range(1, num_nodes):
        parent = rng.randrange(i)
        right = target(request, paths[parent])
        tokens.append(right if rng.random() < helpful else rng.randrange(VOCAB))
        parents.append(parent)
        depths.append(depths[parent] + 1)
        paths.append([*paths[parent], tokens[-1]])
    return DraftTree(token_ids=tokens, parents=parents, depths=depths, scores=[0] * num_nodes)


def choose(walking):
    return [target(request, path) for request, _, path in walking]


@pytest.mark.parametrize("helpful", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_requests", [1, 3, 16])
def test_walk_equals_plain_greedy(num_requests, helpful):
    rng = random.Random(f"{num_requests} {helpful}")
    longest = 0
    for _ in range(40):
        trees = [random_tree(rng, r, rng.choice((1, 2, 9, 40)), helpful=helpful) for r in range(num_requests)]
        paths = accept_trees(trees, choose)
        for r, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            assert path.token_ids == plain_greedy(r, len(path.nodes))
            assert path.nodes == tree.path(path.nodes[-1])
            assert [tree.token_ids[node] for node in path.nodes[1:]] == path.token_ids[:-1]
            # The walk goes on as long as some child of the last node carries the target's token.
            assert path.bonus_id not in [tree.token_ids[child] for child in tree.children(path.nodes[-1])]
            assert path.num_accepted == len(path.nodes) - 1
            longest = max(longest, path.num_accepted)
    assert longest >= (1 if helpful == 0.0 else 2)


def test_first_of_equal_siblings_is_walked():
    tree = DraftTree(token_ids=[0, 3, 3, 4], parents=[-1, 0, 0, 2], depths=[0, 1, 1, 2], scores=[0] * 4)
    path = accept_trees([tree], lambda walking: [3 if node == 0 else 4 for _, node, _ in walking])[0]
    assert path == AcceptedPath(nodes=[0, 1], token_ids=[3, 4])


def test_levels_are_batched_and_paths_are_copies():
    chain = DraftTree(token_ids=[9, 1, 2], parents=[-1, 0, 1], depths=[0, 1, 2], scores=[0] * 3)
    calls = []

    def record(walking):
        calls.append(walking)
        return [len(path) + 1 for _, _, path in walking]

    accept_trees([DraftTree.root_only(4), chain, chain], record)
    assert calls == [
        [(0, 0, []), (1, 0, []), (2, 0, [])],
        [(1, 1, [1]), (2, 1, [1])],
        [(1, 2, [1, 2]), (2, 2, [1, 2])],
    ]


def test_empty_batch_asks_nothing():
    assert accept_trees([], lambda walking: pytest.fail("asked")) == []


def test_wrong_number_of_choices_is_refused():
    with pytest.raises(ValueError, match="zip"):
        accept_trees([DraftTree.root_only(1)], lambda walking: [])
