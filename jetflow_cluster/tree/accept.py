"""The walk: from the root along the tokens that the target itself chooses, as far as the tree holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jetflow_cluster.tree.draft_tree import DraftTree

#: Gives the target's own token behind each ``(request index, node index, accepted token ids behind the anchor)``.
Choose = Callable[[list[tuple[int, int, list[int]]]], list[int]]


@dataclass(kw_only=True)
class AcceptedPath:
    """What one walk found."""

    #: Accepted nodes, the root first.
    nodes: list[int]
    #: Tokens of the accepted nodes behind the root, then the bonus token: one token per accepted node.
    token_ids: list[int]

    @property
    def num_accepted(self) -> int:
        """Guesses that were right."""
        return len(self.nodes) - 1

    @property
    def bonus_id(self) -> int:
        """The target's token at the last accepted node, which no child of it carries."""
        return self.token_ids[-1]


def accept_trees(trees: Sequence[DraftTree], choose: Choose) -> list[AcceptedPath]:
    """Walks all trees at once, level by level.

    Lossless for any tree: every token of every path is the target's own. Of siblings with the same token the first
    is walked. The target is asked only at nodes that a walk reaches.

    Args:
        trees: one per request.
        choose: gives the target's token at each node that the walks have reached; called once per level with the
            requests still walking, in order. Raises ValueError when it returns another number of tokens.

    Returns:
        One path per tree.
    """
    paths = [AcceptedPath(nodes=[0], token_ids=[]) for _ in trees]
    children = [tree.children_by_token() for tree in trees]
    walking = list(range(len(trees)))
    while walking:
        reached = [(r, paths[r].nodes[-1], paths[r].token_ids.copy()) for r in walking]
        still_walking = []
        for (r, node, _), token in zip(reached, choose(reached), strict=True):
            path = paths[r]
            path.token_ids.append(token)
            child = children[r].get((node, token))
            if child is not None:
                path.nodes.append(child)
                still_walking.append(r)
        walking = still_walking
    return paths
