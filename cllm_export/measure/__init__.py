"""Measurements of forwards and of decoding."""
