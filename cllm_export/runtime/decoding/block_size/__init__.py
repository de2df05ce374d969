"""Who chooses n, and what a forward of n tokens takes."""
