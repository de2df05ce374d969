"""Opens a checkpoint directory, checks it, and names the reason if it refuses it."""
