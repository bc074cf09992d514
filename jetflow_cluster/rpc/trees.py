"""Between `StepTree` and its message."""

from __future__ import annotations

from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import GuessSource, StepTree

_SOURCES: dict[int, GuessSource] = {
    pb.GUESS_SOURCE_ANCHOR: GuessSource.ANCHOR,
    pb.GUESS_SOURCE_HEAD: GuessSource.HEAD,
    pb.GUESS_SOURCE_CONTEXT: GuessSource.CONTEXT,
    pb.GUESS_SOURCE_HEAD_AND_CONTEXT: GuessSource.HEAD_AND_CONTEXT,
}
_SOURCES_TO_PROTO = {source: number for number, source in _SOURCES.items()}


def tree_to_proto(tree: StepTree) -> pb.DraftTree:
    """The message."""
    return pb.DraftTree(
        token_ids=tree.token_ids,
        parents=tree.parents,
        path_logprobs=tree.path_logprobs,
        sources=[_SOURCES_TO_PROTO[source] for source in tree.sources],  # type: ignore[misc]
        accepted_nodes=tree.accepted_nodes,
    )


def tree_from_proto(message: pb.DraftTree) -> StepTree:
    """The tree. A source of which this version does not know counts as the draft head."""
    return StepTree(
        token_ids=list(message.token_ids),
        parents=list(message.parents),
        path_logprobs=list(message.path_logprobs),
        sources=[source_of(number) for number in message.sources],
        accepted_nodes=list(message.accepted_nodes),
    )


def source_of(number: int) -> GuessSource:
    """A source by its number."""
    return _SOURCES.get(number, GuessSource.HEAD)
