"""Weights, streamed from the checkpoint into the bundle."""
