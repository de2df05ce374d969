"""Traces and rewrites the graph, without weights."""
