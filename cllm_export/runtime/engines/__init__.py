"""Engines. Each runs forwards over a static KV cache."""
