"""Figures: what forwards and prompts take."""
