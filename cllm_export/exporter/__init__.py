"""Checkpoint to bundle: trace, passes, lint, weights. Needs the ``export`` extra; the runtime never imports it."""
