"""Tensor parallelism: groups of ranks and the slices of weights that they hold."""
