"""Writes new K and V into their slots."""

from jetflow_kernels.store_kv.reference import store_kv

__all__ = ["store_kv"]
