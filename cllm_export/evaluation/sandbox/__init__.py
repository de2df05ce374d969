"""Code that a model wrote, run in confinement."""
