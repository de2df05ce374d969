"""The evaluation tasks, each in a file of its own: their prompts and their scoring."""
