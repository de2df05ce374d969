"""The checkpoint in PyTorch: packed for training, or as an engine."""
