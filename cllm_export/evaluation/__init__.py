"""Measures checkpoints and bundles: task scores, decoding measures, the readiness probe. Loads no torch."""
