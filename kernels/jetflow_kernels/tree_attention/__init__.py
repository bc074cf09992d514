"""Attention of prompt chunks, single tokens and trees over paged KV: plan once per batch, run once per layer."""

from jetflow_kernels.tree_attention.dispatch import tree_attention
from jetflow_kernels.tree_attention.plan import TreeAttentionPlan, plan_tree_attention
from jetflow_kernels.tree_attention.reference import tree_attention_reference
from jetflow_kernels.tree_attention.static import (
    HeadLayout,
    JoinedAttention,
    StaticAttention,
    block_attention,
    tree_rows_attention,
)

#: Who sees whom, in any of its forms.
AttentionPlan = TreeAttentionPlan | StaticAttention | JoinedAttention

__all__ = [
    "AttentionPlan",
    "HeadLayout",
    "JoinedAttention",
    "StaticAttention",
    "TreeAttentionPlan",
    "block_attention",
    "plan_tree_attention",
    "tree_attention",
    "tree_attention_reference",
    "tree_rows_attention",
]
