"""KV pages: the pool, who uses which, and which can be shared."""
