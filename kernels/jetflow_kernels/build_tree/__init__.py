"""The most probable trees of a batch from its candidate tables, laid out as the rows that the target verifies."""

from jetflow_kernels.build_tree.buffers import MAX_ROWS, Candidates, RowLayout, TreeBuffers, TreeLimits
from jetflow_kernels.build_tree.dispatch import build_tree, lay_out_rows
from jetflow_kernels.build_tree.reference import build_tree_reference, lay_out_rows_reference

__all__ = [
    "MAX_ROWS",
    "Candidates",
    "RowLayout",
    "TreeBuffers",
    "TreeLimits",
    "build_tree",
    "build_tree_reference",
    "lay_out_rows",
    "lay_out_rows_reference",
]
