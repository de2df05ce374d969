"""The checkpoint in PyTorch: for packed training batches, or as an engine."""
