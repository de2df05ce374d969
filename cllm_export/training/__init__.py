"""Makes Consistency LLMs: trajectories, losses, the tuning loop. Needs the extra ``train``; nothing else may import it."""
