"""Training data: samples and the Jacobi states of their windows."""
