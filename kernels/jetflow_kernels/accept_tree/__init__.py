"""The walk from the root along the tokens that the target itself chooses, for a batch of trees, on the device."""

from jetflow_kernels.accept_tree.buffers import SamplingTable, VerifiedTrees, WalkBuffers
from jetflow_kernels.accept_tree.dispatch import accept_tree, commit_slots
from jetflow_kernels.accept_tree.reference import accept_tree_reference, commit_slots_reference

__all__ = [
    "SamplingTable",
    "VerifiedTrees",
    "WalkBuffers",
    "accept_tree",
    "accept_tree_reference",
    "commit_slots",
    "commit_slots_reference",
]
