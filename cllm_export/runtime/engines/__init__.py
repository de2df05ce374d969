"""What runs a forward over a static KV cache."""
