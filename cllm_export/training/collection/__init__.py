"""Collections of Jacobi trajectories."""
