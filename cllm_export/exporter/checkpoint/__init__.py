"""A checkpoint directory: opened, judged, refused by name."""
