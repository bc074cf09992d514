"""Moves the KV of accepted nodes behind their prefixes."""

from jetflow_kernels.commit_kv.reference import commit_kv

__all__ = ["commit_kv"]
