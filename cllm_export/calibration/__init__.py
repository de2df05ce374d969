"""Calibration: record the inputs of a bundle's linear layers in decode, and measure what quantising them costs."""
