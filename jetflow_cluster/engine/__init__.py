"""The engine: one step function over one ragged batch."""
