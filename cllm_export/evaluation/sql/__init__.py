"""Judges SQL: by execution on generated rows, by its literals, by its components."""
