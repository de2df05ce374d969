"""Compares a bundle with its checkpoint."""
