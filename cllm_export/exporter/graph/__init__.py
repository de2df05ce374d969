"""The graph: traced, rewritten, without weights."""
