"""Measure what quantising costs, and choose which layers keep their precision."""
