"""A step's tree as a request's caller is told it."""

from __future__ import annotations

from jetflow_cluster.engine.request import Request
from jetflow_cluster.tree.build import SCORE_UNIT
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.lookup import ContextGuess
from jetflow_cluster.types import GuessSource, StepTree


def told_tree(request: Request, tree: DraftTree, accepted_nodes: list[int]) -> StepTree:
    """The tree of the step that just ended; takes the request's `context_guess` away.

    Args:
        request: for which it was built.
        tree: with its nodes.
        accepted_nodes: root first.
    """
    guess, request.context_guess = request.context_guess, None
    return StepTree(
        token_ids=tree.token_ids,
        parents=tree.parents,
        path_logprobs=[score / SCORE_UNIT for score in tree.scores],
        sources=_sources(tree, guess),
        accepted_nodes=accepted_nodes,
    )


def _sources(tree: DraftTree, guess: ContextGuess | None) -> list[GuessSource]:
    """A node is the context's when all of its path is what the context said; the drafter's too as far as it said the
    same from the root on."""
    sources = [GuessSource.ANCHOR] + [GuessSource.HEAD] * (tree.num_nodes - 1)
    if guess is None:
        return sources
    on_path = [True] + [False] * (tree.num_nodes - 1)
    for node in range(1, tree.num_nodes):
        depth = tree.depths[node]
        if on_path[tree.parents[node]] and depth <= len(guess.token_ids):
            on_path[node] = tree.token_ids[node] == guess.token_ids[depth - 1]
        if on_path[node]:
            is_shared = depth <= guess.num_shared
            sources[node] = GuessSource.HEAD_AND_CONTEXT if is_shared else GuessSource.CONTEXT
    return sources
