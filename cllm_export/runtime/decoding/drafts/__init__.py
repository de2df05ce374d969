"""Draft sources: they guess the tokens of a block."""
