"""Sizes and kinds of the steps that run on static buffers, and what goes to and comes from the device in each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jetflow_cluster.engine.staging import Fields
from jetflow_cluster.engine.value_model import NUM_DEPTHS, NUM_KNOTS
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH

#: Sizes of buckets; a batch takes the smallest that holds it.
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NODES = (1, 8, 16, 32, 64, 128, 256, 512)
ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
CHANGED = (16, 64, 256, 1024, 4096, 16384, 65536)
BARRED = (4, 16, 64)


def at_least(sizes: Sequence[int], value: int) -> int:
    """The smallest of ascending sizes that holds so many, or the last one."""
    return sizes[min(bisect_left(sizes, value), len(sizes) - 1)]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sizes and kinds of the steps that one sequence of launches serves."""

    num_requests: int
    #: Nodes of one tree, root included; 1 is no speculation.
    num_nodes: int
    #: Rows of all trees together.
    num_rows: int
    #: Pages of one request.
    num_pages: int
    #: Some request samples.
    has_noise: bool
    #: Some request has top-k, top-p or min-p.
    has_filters: bool
    #: Fused hidden vectors of the rows are wanted; always so with trees.
    has_taps: bool
    #: The draft head runs; without it trees hold what requests' own texts say.
    has_head: bool = False
    #: Some request's draft context does not begin with its first token.
    has_gaps: bool = False
    #: Guesses from requests' own texts are mixed in.
    has_lookup: bool = False
    #: Scores are calibrated, and trees are cut where they no longer pay.
    has_price: bool = False
    #: Tokens of one request with a penalty or a bias, and tokens that it may not choose yet; 0 where there are none.
    num_changed: int = 0
    num_barred: int = 0
    #: Logits are read behind the step.
    keeps_logits: bool = False

    @property
    def has_trees(self) -> bool:
        """Some tree may hold more than its root."""
        return self.num_nodes > 1

    @property
    def has_changes(self) -> bool:
        """Some request has penalties, biases, or tokens that it may not choose yet."""
        return self.num_changed > 0 or self.num_barred > 0


def input_fields(bucket: Bucket) -> Fields:
    """What the host writes before each step; see `StaticStep`."""
    requests = bucket.num_requests
    fields = {
        "anchor_ids": ((requests,), torch.int64),
        "context_lens": ((requests,), torch.int32),
        "limits": ((requests, 4), torch.int32),
        "budget": ((1,), torch.int32),
        "has_context": ((requests,), torch.int32),
        "page_table": ((requests, bucket.num_pages), torch.int32),
        "numbers": ((requests, 5), torch.int64),
        "factors": ((requests, 6), torch.float64),
    }
    if bucket.has_gaps:
        fields |= {"gap_pages": ((requests,), torch.int32)}
    if bucket.has_lookup:
        fields |= {
            "guess_ids": ((requests, MAX_LOOKUP_DEPTH), torch.int64),
            "guess_weights": ((requests, MAX_LOOKUP_DEPTH), torch.float64),
            "num_guesses": ((requests,), torch.int32),
            "num_own": ((requests,), torch.int32),
        }
    if bucket.has_changes:
        changed = (requests, bucket.num_changed)
        fields |= {
            "changed_bias": (changed, torch.float64),
            "changed_ids": (changed, torch.int32),
            "changed_counts": (changed, torch.int32),
            "barred_ids": ((requests, bucket.num_barred), torch.int32),
        }
    if bucket.has_price:
        fields |= {
            "maps": ((2, NUM_DEPTHS, NUM_KNOTS), torch.int32),
            "kinds": ((requests,), torch.int32),
            "row_costs": ((bucket.num_rows + 1,), torch.int64),
        }
    return fields


def output_fields(bucket: Bucket, num_levels: int) -> Fields:
    """What the host reads behind each step; see `StaticStep`."""
    requests, nodes = bucket.num_requests, bucket.num_nodes
    trees = dict.fromkeys(TREE_COLUMNS, ((requests, nodes), torch.int32)) if bucket.has_trees else {}
    return {
        "nodes": ((requests, num_levels), torch.int32),
        "token_ids": ((requests, num_levels), torch.int32),
        "lengths": ((requests,), torch.int32),
        "counts": ((requests,), torch.int32),
        **({"num_shared": ((requests,), torch.int32)} if bucket.has_lookup else {}),
        **{f"tree_{name}": field for name, field in trees.items()},
    }


#: Of `TreeBuffers`: what a tree is made of.
TREE_COLUMNS = ("token_ids", "parents", "depths", "scores")
