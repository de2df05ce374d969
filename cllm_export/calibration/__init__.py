"""Calibration: what a bundle's linear layers see while it decodes, and what quantising them costs in convergence."""
