"""The tree of guesses of one request: flat lists, root first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DraftTree:
    """Nodes of one tree; node 0 is the anchor. Trees that `build_trees` makes list their nodes best first, so any
    prefix of the nodes is the exact smaller tree.
    """

    #: Token of each node.
    token_ids: list[int]
    #: Parent of each node, ``parents[i] < i``; -1 for the root.
    parents: list[int]
    #: Tokens between the anchor and each node, the node's own counted; 0 for the root.
    depths: list[int]
    #: Cumulative log-probability of each node's path, fixed point in 2^-16 nat, int32; 0 for the root.
    scores: list[int]

    @classmethod
    def root_only(cls, anchor_id: int) -> DraftTree:
        """A tree without guesses: token-by-token decoding."""
        return cls(token_ids=[anchor_id], parents=[-1], depths=[0], scores=[0])

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return len(self.parents)

    def children(self, node: int) -> list[int]:
        """Nodes that hang on this one, in order."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def children_by_token(self) -> dict[tuple[int, int], int]:
        """``{(node, token id): child}``; of siblings with one token, the first."""
        pairs = list(zip(self.parents, self.token_ids, strict=True))
        return {pairs[i]: i for i in range(len(pairs) - 1, 0, -1)}

    def path(self, node: int) -> list[int]:
        """Nodes from the root to this one, both included."""
        nodes = [node]
        while (parent := self.parents[nodes[-1]]) >= 0:
            nodes.append(parent)
        return nodes[::-1]

    def validate(self) -> None:
        """Raises ValueError, naming node and value, unless this is a tree."""
        lengths = {len(self.token_ids), len(self.parents), len(self.depths), len(self.scores)}
        if len(lengths) > 1:
            raise ValueError(f"token_ids, parents, depths and scores have different lengths: {sorted(lengths)}")
        if not self.parents:
            raise ValueError("the tree has no root")
        if self.parents[0] != -1 or self.depths[0] != 0:
            raise ValueError(f"the root has parent {self.parents[0]} and depth {self.depths[0]}: must be -1 and 0")
        for i, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < i:
                raise ValueError(f"parents[{i}] = {parent}: must be in [0, {i - 1}]")
            if self.depths[i] != self.depths[parent] + 1:
                raise ValueError(f"depths[{i}] = {self.depths[i]}: must be {self.depths[parent] + 1}")
