"""Norm and rotation of q and k, and the store of k and v into pages, in one launch."""

from jetflow_kernels.qk_norm_rope_store.dispatch import qk_norm_rope_store
from jetflow_kernels.qk_norm_rope_store.reference import qk_norm_rope_store_reference

__all__ = ["qk_norm_rope_store", "qk_norm_rope_store_reference"]
