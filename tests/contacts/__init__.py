"""Meetings with outside things that judge this project: real package managers, builders, clients and models."""
