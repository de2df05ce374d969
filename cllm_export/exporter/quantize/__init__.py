"""Quantisation of the graph's linear layers."""
