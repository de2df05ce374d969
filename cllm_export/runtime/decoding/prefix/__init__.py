"""What is kept of texts that were read."""
