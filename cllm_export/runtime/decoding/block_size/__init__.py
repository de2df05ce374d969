"""The choice of the block size n, and the time of a forward of n tokens."""
