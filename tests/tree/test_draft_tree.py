"""The flat tree, its checks and its masks."""

from __future__ import annotations

import pytest
import torch

from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.mask import ancestor_mask, packed_ancestor_mask


def make_tree(parents: list[int], token_ids: list[int] | None = None) -> DraftTree:
    depths = [0] * len(parents)
    for i, parent in enumerate(parents[1:], 1):
        depths[i] = depths[parent] + 1 if 0 <= parent < i else 1
    ids = token_ids if token_ids is not None else list(range(len(parents)))
    return DraftTree(token_ids=ids, parents=parents, depths=depths, scores=[-d for d in depths])


def test_root_only():
    tree = DraftTree.root_only(42)
    tree.validate()
    assert (tree.num_nodes, tree.token_ids, tree.parents, tree.depths, tree.scores) == (1, [42], [-1], [0], [0])
    assert tree.children(0) == []
    assert tree.children_by_token() == {}


def test_children_and_path():
    tree = make_tree([-1, 0, 0, 1, 1, 0, 3], token_ids=[9, 5, 6, 7, 7, 5, 8])
    tree.validate()
    assert [tree.children(i) for i in range(7)] == [[1, 2, 5], [3, 4], [], [6], [], [], []]
    # Of siblings with one token the first is taken.
    assert tree.children_by_token() == {(0, 5): 1, (0, 6): 2, (1, 7): 3, (3, 8): 6}
    assert tree.path(6) == [0, 1, 3, 6]


BROKEN = [
    pytest.param({"token_ids": [1]}, "lengths", id="lengths"),
    pytest.param({"token_ids": [], "parents": [], "depths": [], "scores": []}, "no root", id="empty"),
    pytest.param({"parents": [0, 0, 1]}, "root", id="root-has-parent"),
    pytest.param({"parents": [-1, 0, 2]}, r"parents\[2\] = 2", id="own-parent"),
    pytest.param({"parents": [-1, -1, 0]}, r"parents\[1\] = -1", id="two-roots"),
    pytest.param({"depths": [0, 1, 1]}, r"depths\[2\] = 1", id="depth"),
    pytest.param({"depths": [1, 2, 3]}, "root", id="root-depth"),
]


@pytest.mark.parametrize("changes, message", BROKEN)
def test_validate_names_what_is_wrong(changes, message):
    fields = {"token_ids": [1, 2, 3], "parents": [-1, 0, 1], "depths": [0, 1, 2], "scores": [0, -1, -2]}
    DraftTree(**fields).validate()
    with pytest.raises(ValueError, match=message):
        DraftTree(**(fields | changes)).validate()


def random_parents(num_nodes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes)]


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 200])
def test_masks_equal_walking_up(num_nodes):
    parents = random_parents(num_nodes, num_nodes)
    expected = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
    for i in range(num_nodes):
        node = i
        while node >= 0:
            expected[i, node] = True
            node = parents[node]
    mask = ancestor_mask(parents)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)

    packed = packed_ancestor_mask(parents)
    assert packed.dtype == torch.int32
    assert packed.shape == (num_nodes, (num_nodes + 31) // 32)
    bits = (packed[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(1)[:, :num_nodes].bool(), expected)
    assert not bits.flatten(1)[:, num_nodes:].any()


def test_chain_mask_is_lower_triangular():
    assert torch.equal(ancestor_mask([-1, 0, 1, 2]), torch.ones(4, 4).tril().bool())
