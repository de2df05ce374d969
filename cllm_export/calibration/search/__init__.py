"""What quantising costs, and which layers to keep."""
