"""Moves the KV of accepted nodes behind their prefixes."""

from jetflow_kernels.commit_kv.dispatch import commit_kv
from jetflow_kernels.commit_kv.reference import commit_kv_reference

__all__ = ["commit_kv", "commit_kv_reference"]
