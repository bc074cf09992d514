"""Gumbel noise that depends on nothing but (seed, position, token id), the same on every device."""

from jetflow_kernels.philox_gumbel.dispatch import philox_gumbel
from jetflow_kernels.philox_gumbel.reference import philox_first_word, philox_gumbel_reference

__all__ = ["philox_first_word", "philox_gumbel", "philox_gumbel_reference"]
