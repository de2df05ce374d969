"""Runs code that a model wrote in a confined process."""
