"""Streams weights from the checkpoint into the bundle."""
