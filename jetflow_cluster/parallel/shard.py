"""Which slice of a dimension a rank holds."""

from __future__ import annotations

from jetflow_cluster.parallel.tp_group import TpGroup


def even_slice(size: int, tp: TpGroup, what: str) -> slice:
    """The rank's equal part.

    Raises:
        ValueError: `size` is no multiple of the group's size; names `what` and both numbers.
    """
    if size % tp.size:
        raise ValueError(f"{what} = {size}: not divisible by tensor_parallel_size = {tp.size}")
    part = size // tp.size
    return slice(tp.rank * part, (tp.rank + 1) * part)


def kv_head_slice(num_kv_heads: int, tp: TpGroup) -> slice:
    """The rank's KV heads; with more ranks than heads each head is held by several ranks.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if tp.size <= num_kv_heads or tp.size % num_kv_heads:
        return even_slice(num_kv_heads, tp, "num_key_value_heads")
    head = tp.rank // (tp.size // num_kv_heads)
    return slice(head, head + 1)
