from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from jetflow_cluster.bench.near_ties import first_difference
from jetflow_cluster.bench.tree_svg import draw_tree
from jetflow_cluster.engine.protocols import TreeRecord
from jetflow_cluster.tree.draft_tree import DraftTree

TREE = DraftTree(
    token_ids=[5, 6, 7, 8, 9],
    parents=[-1, 0, 1, 0, 1],
    depths=[0, 1, 2, 1, 2],
    scores=[0, -10_000, -40_000, -70_000, -90_000],
)


def record(accepted: list[int], tokens: list[int], tree: DraftTree = TREE) -> TreeRecord:
    return TreeRecord(request_id="r", tree=tree, accepted_nodes=accepted, token_ids=tokens)


def decode(ids: object) -> str:
    return f"<{ids}>\n"


def by_class(svg: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if kind in (e.get("class") or "").split()]


@pytest.mark.parametrize(
    "accepted, tokens, num_kept, num_own",
    [
        pytest.param([0], [4], 1, 1, id="nothing-kept"),
        pytest.param([0, 1, 4], [6, 9, 4], 3, 1, id="path-and-own-token"),
        pytest.param([0, 1, 4], [6, 9], 3, 0, id="stopped-inside-the-path"),
    ],
)
def test_drawing_marks_the_kept_path(accepted: list[int], tokens: list[int], num_kept: int, num_own: int) -> None:
    svg = draw_tree(record(accepted, tokens), decode)
    nodes = by_class(svg, "node")
    assert len(nodes) == 5 + num_own
    assert sum("kept" in (node.get("class") or "") for node in nodes) == num_kept
    assert len(by_class(svg, "edge")) == 4 + num_own
    assert len(by_class(svg, "own")) == num_own
    places = [(node.get("x"), node.get("y")) for node in nodes]
    assert len(set(places)) == len(places)


def test_roots_alone_are_drawn() -> None:
    svg = draw_tree(record([0], [4], DraftTree.root_only(5)), decode)
    assert len(by_class(svg, "node")) == 2


@pytest.mark.parametrize(
    "a, b, expected",
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)],
    ids=["equal", "different", "shorter", "empty"],
)
def test_first_difference(a: list[int], b: list[int], expected: int | None) -> None:
    assert first_difference(a, b) == expected
