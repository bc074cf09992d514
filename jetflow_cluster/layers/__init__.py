"""Layers that know their shard."""
