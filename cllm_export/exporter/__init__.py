"""Turns a checkpoint into a bundle: trace, passes, lint, weights. Needs the ``export`` extra.

The runtime never imports this package.
"""
