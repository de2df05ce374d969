"""What is trained on: samples and the Jacobi states of their windows."""
